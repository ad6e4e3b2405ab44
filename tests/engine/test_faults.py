"""What breaks in the model ends the requests that caused it, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from promptd_store import PromptArtifact, encode

from promptd.engine.engine import Engine, Output
from promptd.engine.request import GenerateRequest, SamplingParams, ScoreRequest
from promptd.errors import NumericalError, PromptdError
from promptd.modeling import PackedBatch, PackedRow
from tests.engine.harness import Case, assert_matches_oracle, frozen, greedy, library, make_engine, run

TEXT = tuple(range(5, 45))


def finish(engine: Engine) -> list[Output]:
    """Step until nothing is left; check every pool after every step."""
    outputs = []
    for _ in range(200):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
        engine.check_integrity()
    raise AssertionError("the engine never finished")


def break_on(engine: Engine, is_bad: Callable[[PackedRow], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model raise for every batch that holds a row for which `is_bad(row)`."""
    whole = type(engine.model).forward_packed

    def forward(model: object, batch: PackedBatch) -> torch.Tensor:
        if any(is_bad(row) for row in batch.rows):
            raise RuntimeError("out of memory")
        return whole(model, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(type(engine.model), "forward_packed", forward)


def test_a_row_that_raises_between_decoding_rows_fails_alone(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any prompt on its way into the cache: the other rows go on, the scoring row's blocks come back."""
    folder = tiny_models["gpt2"]
    engine = make_engine(folder)
    good = Case((), TEXT, greedy(8))
    engine.add_request(GenerateRequest("good", TEXT, good.params))
    engine.step()
    engine.add_request(ScoreRequest("bad", (99, 7), ((5, 6), (7, 8, 9))))
    break_on(engine, lambda row: 99 in row.token_ids, monkeypatch)
    outputs = finish(engine)
    (failed,) = [output for output in outputs if output.error is not None]
    assert failed.request_id == "bad" and type(failed.error) is PromptdError
    good.outputs = [output for output in outputs if output.request_id == "good"]
    assert len(good.tokens) == 7
    assert engine.blocks.num_used == 0


@pytest.mark.parametrize("budget", [2048, 8])
def test_a_prompt_that_raises_on_its_way_in_fails_its_requests_alone(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Everybody behind the prompt gets a typed error, at once or midway; the rest of the batch goes on; nothing of
    the prompt stays resident."""
    folder = tiny_models["llama"]
    prompts = library(folder)
    bad: PromptArtifact = encode("soft", torch.full((20, frozen(folder).spec.hidden_size), 0.25))
    engine = make_engine(folder, max_num_batched_tokens=budget, max_num_seqs=6)
    first_bad = 0 if budget > 20 else 8

    def is_bad(row: PackedRow) -> bool:  # with the small budget: a later chunk of it
        learned = any(bool((part.embeds == 0.25).all()) for part in row.virtual)
        return learned and row.first_position >= first_bad

    break_on(engine, is_bad, monkeypatch)
    good = [Case((prompt,), TEXT, greedy(5)) for prompt in (prompts[2], prompts[6])]
    chains = {f"g{number}": case.prompts for number, case in enumerate(good)}
    chains |= {"b0": (bad,), "b1": (bad, prompts[5]), "b2": (bad, prompts[1])}
    for request_id, chain in chains.items():
        engine.add_request(GenerateRequest(request_id, TEXT, greedy(5), chain))
    outputs = finish(engine)
    failed = [output for output in outputs if output.error is not None]
    assert sorted(output.request_id for output in failed) == ["b0", "b1", "b2"]
    assert all(type(output.error) is PromptdError for output in failed)
    for number, case in enumerate(good):
        case.outputs = [output for output in outputs if output.request_id == f"g{number}"]
        assert len(case.tokens) == 5
        assert_matches_oracle(folder, case)
    resident = sum(prompt.num_virtual_tokens for case in good for prompt in case.prompts)
    assert engine.stats().prompt_cache_bytes == resident * engine.pool.bytes_per_slot


def test_texts_that_met_a_fault_are_not_found_again(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Non-finite logits: the row's blocks may hold the fault, so that the same text is computed anew next time."""
    folder = tiny_models["llama"]
    engine = make_engine(folder)
    whole = type(engine.model).forward_packed
    monkeypatch.setattr(type(engine.model), "forward_packed", lambda model, batch: whole(model, batch) * torch.nan)
    bad = Case((), TEXT, greedy(3))
    run(engine, [bad])
    assert isinstance(bad.outputs[-1].error, NumericalError)
    monkeypatch.undo()
    again, sharing = replace(bad, outputs=[]), Case((), (*TEXT, 7), greedy(3), arrives=8)
    run(engine, [again, sharing])
    assert again.outputs[-1].num_cached_tokens == 0
    assert sharing.outputs[-1].num_cached_tokens == 32  # control: good blocks are found
    for case in (again, sharing):
        assert_matches_oracle(folder, case)


def test_an_end_token_outside_the_vocabulary_is_ignored(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A generation config may name tokens that the model cannot make; forbidding them must not break the batch."""
    folder = Path(shutil.copytree(tiny_models["gpt2"], tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5000]}))
    case = Case((), TEXT, SamplingParams(max_tokens=3, min_tokens=3, temperature=0))
    run(make_engine(folder), [case])
    assert len(case.tokens) == 3 and frozen(folder).eos_token_ids == {0}
