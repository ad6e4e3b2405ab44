"""Encoders: any mix of prompts in one packed pass equals transformers' own forward, one text at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promptd_store import ArtifactError, decode, encode

from promptd.engine.request import GenerateRequest, Output, PoolRequest, SamplingParams, ScoreRequest
from promptd.errors import ContextLengthError, InvalidRequestError
from promptd.modeling import load_model
from tests.engine.encoder_oracle import (
    FIRST,
    LAST,
    MASK,
    TOLERANCE,
    class_scores,
    hidden_states,
    library,
    make_engine,
    oracle,
    run,
)
from tests.engine.harness import frozen

CLASSIFIERS = ("bert", "roberta")
#: The tight one cuts a batch into many steps and evicts prefixes.
LIMITS = {"roomy": {}, "tight": {"max_num_batched_tokens": 64, "max_num_seqs": 5, "prompt_tokens": 24}}


def text(rng: random.Random, length: int) -> tuple[int, ...]:
    """Token ids of a text between its two special tokens."""
    return (FIRST, *(rng.randrange(1, 300) for _ in range(length)), LAST)


def assert_equal(output: Output, expected: torch.Tensor) -> None:
    """Values lie within the tolerance of what transformers says."""
    assert output.error is None
    found = torch.tensor(output.values)  # type: ignore[union-attr]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", CLASSIFIERS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(
        st.tuples(st.lists(st.integers(0, 7), max_size=2), st.integers(0, 30), st.integers(0, 99)),
        min_size=2,
        max_size=9,
    )
)
def test_any_mix_equals_one_at_a_time(
    tiny_encoders: dict[str, Path], family: str, limits: str, drawn: list[tuple[list[int], int, int]]
) -> None:
    """Soft prompts in front and behind the first token, prefixes, texts, chains and bare rows, heads of their own or
    the model's, in one batch: each row's class scores are those that transformers gives it alone."""
    folder = tiny_encoders[family]
    prompts = library(folder, family)
    rows = [(tuple(prompts[n] for n in chain), text(random.Random(seed), length)) for chain, length, seed in drawn]
    requests = [PoolRequest(str(n), ids, "classes", chain) for n, (chain, ids) in enumerate(rows)]
    outputs = run(make_engine(folder, **LIMITS[limits]), requests)  # type: ignore[arg-type]
    for output, (chain, ids) in zip(outputs, rows, strict=True):
        assert_equal(output, class_scores(folder, chain, ids))
        assert output.num_prompt_tokens == len(ids)
        assert output.num_virtual_tokens == sum(prompt.num_virtual_tokens for prompt in chain)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_swap_of_two_prompts_is_seen(tiny_encoders: dict[str, Path], family: str) -> None:
    """Control: every prompt gives scores of its own, also where its place or its head alone makes the difference."""
    folder = tiny_encoders[family]
    prompts = library(folder, family)
    ids = text(random.Random(1), 12)
    moved = encode("soft", prompts[0].tensors["prompt_embeddings"], prompt_after_bos=True)
    chains = [(), *((prompt,) for prompt in prompts), (moved,), (prompts[0], prompts[4]), (prompts[1], prompts[0])]
    requests = [PoolRequest(str(n), ids, "classes", chain) for n, chain in enumerate(chains)]
    values = [output.values for output in run(make_engine(folder), requests)]  # type: ignore[union-attr]
    for at, one in enumerate(values):
        for other in values[:at]:
            assert len(one) != len(other) or max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-2


@pytest.mark.parametrize("family", ["bert-words", "roberta-words"])
def test_words_at_the_mask(tiny_encoders: dict[str, Path], family: str) -> None:
    """Label words are scored by the masked-LM head at the text's mask, wherever soft prompts move it."""
    folder = tiny_encoders[family]
    model, words = oracle(folder), ((17,), (201,), (5,))
    ids = (FIRST, 60, 61, MASK, 62, LAST)
    chains = [(), *((prompt,) for prompt in library(folder, family) if not prompt.head)]
    requests = [ScoreRequest(str(n), ids, words, chain) for n, chain in enumerate(chains)]
    for output, chain in zip(run(make_engine(folder), requests), chains, strict=True):
        logits = hidden_states(model, folder, chain, ids).logits[0]
        at = 3 - len(ids)  # counted from the end: nothing stands behind the text
        expected = logits[at].log_softmax(-1)[[17, 201, 5]]
        found = torch.tensor(output.logprobs)  # type: ignore[union-attr]
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * logits.abs().max().item())
    engine = make_engine(folder)
    for token_ids, candidates, field in (
        ((FIRST, 60, LAST), words, "prompt"),
        ((FIRST, MASK, MASK, LAST), words, "prompt"),
        (ids, ((17, 18), (5,)), "candidates"),
    ):
        with pytest.raises(InvalidRequestError) as error:
            engine.add_request(ScoreRequest("x", token_ids, candidates))
        assert error.value.param == field


@pytest.mark.parametrize(
    ("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", False)], ids=["mean", "normalized", "cls"]
)
def test_embeddings(tiny_encoders: dict[str, Path], tmp_path: Path, pooling: str, normalize: bool) -> None:
    """Pooled as the sentence-transformers files say, over the text's tokens and not the soft prompt's."""
    folder = tiny_encoders["bert-plain"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    types += ["sentence_transformers.models.Normalize"] * normalize
    modules = ", ".join(f'{{"idx": {n}, "path": "{n}", "type": "{name}"}}' for n, name in enumerate(types))
    (tmp_path / "modules.json").write_text(f"[{modules}]")
    (tmp_path / "1").mkdir()
    flag = {"mean": "mean_tokens", "cls": "cls_token"}[pooling]
    (tmp_path / "1" / "config.json").write_text(f'{{"word_embedding_dimension": 48, "pooling_mode_{flag}": true}}')
    ids = text(random.Random(2), 9)
    soft, behind, prefix = (library(folder, "bert")[n] for n in (0, 1, 5))
    chains = [(), (soft,), (behind,), (prefix,)]
    requests = [PoolRequest(str(n), ids, "embedding", chain) for n, chain in enumerate(chains)]
    for output, chain in zip(run(make_engine(tmp_path), requests), chains, strict=True):
        hidden = hidden_states(oracle(folder), folder, chain, ids).last_hidden_state[0]
        places = {(): range(11), (soft,): range(3, 14), (behind,): (0, *range(10, 20)), (prefix,): range(11)}[chain]
        own = hidden[list(places)]
        expected = own.mean(0) if pooling == "mean" else own[0]
        assert_equal(output, torch.nn.functional.normalize(expected, dim=0) if normalize else expected)


def test_strict_rows_have_the_same_bits_alone_and_mixed(tiny_encoders: dict[str, Path]) -> None:
    """`strict`: a row's scores are bitwise equal whatever else is in the batch."""
    folder = tiny_encoders["bert"]
    rng = random.Random(3)
    requests = [
        PoolRequest(str(n), text(rng, 3 + 4 * n), "classes", (prompt,))
        for n, prompt in enumerate(library(folder, "bert"))
    ]
    together = run(make_engine(folder, strict=True), requests)
    for request, output in zip(requests, together, strict=True):
        assert run(make_engine(folder, strict=True), [request])[0].values == output.values  # type: ignore[union-attr]


def test_what_an_encoder_cannot_do_is_a_typed_error(
    tiny_encoders: dict[str, Path], tiny_models: dict[str, Path]
) -> None:
    """Generation, texts that do not fit, heads where there are none: errors that name the field."""
    engine = make_engine(tiny_encoders["bert"], max_num_batched_tokens=32)
    ids = text(random.Random(4), 6)
    with pytest.raises(InvalidRequestError, match="does not continue"):
        engine.add_request(GenerateRequest("g", ids, SamplingParams()))
    with pytest.raises(InvalidRequestError, match="no head that predicts words"):
        engine.add_request(ScoreRequest("s", ids, ((1,), (2,))))
    with pytest.raises(ContextLengthError, match="one step"):
        engine.add_request(PoolRequest("p", text(random.Random(4), 40), "classes"))
    with pytest.raises(ContextLengthError, match="130"):
        engine.add_request(PoolRequest("p", text(random.Random(4), 140), "classes"))
    plain = make_engine(tiny_encoders["bert-plain"])
    with pytest.raises(InvalidRequestError, match="classification head"):
        plain.add_request(PoolRequest("p", ids, "classes"))
    decoder = make_engine(tiny_models["llama"])
    with pytest.raises(InvalidRequestError, match="continues texts"):
        decoder.add_request(PoolRequest("p", (1, 2), "embedding"))
    headed = library(tiny_encoders["bert"], "bert")[2]
    with pytest.raises(ArtifactError, match="takes no classification head"):
        decode(headed.content, frozen(tiny_models["llama"]).spec)
    assert not engine.has_work and not plain.has_work and not decoder.has_work


def test_a_bad_row_hurts_only_itself(tiny_encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft prompt of NaNs ends its own row; one that makes the pass raise ends its own row; the others are exact."""
    folder = tiny_encoders["bert"]
    good = library(folder, "bert")[0]
    poison = encode("soft", torch.full((2, 48), torch.nan))
    broken = encode("soft", torch.ones(2, 48))
    ids = text(random.Random(6), 8)
    chains = [(good,), (poison,), (), (broken,)]
    engine = make_engine(folder)
    read = engine.model.family.read_whole

    def raising(embeds: torch.Tensor, positions: torch.Tensor, batch: object) -> torch.Tensor:
        if (embeds == 1).all(1).any():
            raise RuntimeError("no such row")
        return read(embeds, positions, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.model.family, "read_whole", raising)
    outputs = run(engine, [PoolRequest(str(n), ids, "classes", chain) for n, chain in enumerate(chains)])
    assert [output.error is None for output in outputs] == [True, False, True, False]
    assert "not finite" in str(outputs[1].error)
    assert "no such row" in str(outputs[3].error)
    for output, chain in zip(outputs, chains, strict=True):
        if output.error is None:
            assert_equal(output, class_scores(folder, chain, ids))


def test_a_checkpoint_without_its_head_is_refused(tiny_encoders: dict[str, Path], tmp_path: Path) -> None:
    """Transformers would make the missing tensors up; a missing pooler is done without."""
    from safetensors.torch import load_file, save_file

    from promptd.errors import ModelRefusedError

    for file in tiny_encoders["bert"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "classifier" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelRefusedError, match="lacks 2 tensors"):
        load_model(tmp_path)
    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(tmp_path).hf.base_model.pooler is None
