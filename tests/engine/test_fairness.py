"""Nobody waits for ever: whatever keeps coming, what came first runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, RequestOutput, ScoreOutput, ScoreRequest
from promptd.errors import InvalidRequestError
from tests.engine.harness import greedy, library, make_engine
from tests.family_models import SEQ2SEQ

TEXT = tuple(range(5, 25))


def steps_until(engine: Engine, request_id: str, *, crowd: int, max_steps: int = 120) -> int:
    """Steps until a request ends, while `crowd` small requests are waiting at any time."""
    for at in range(max_steps):
        while len(engine.scheduler.waiting) < crowd:
            engine.add_request(GenerateRequest(f"small-{at}-{len(engine.scheduler.waiting)}", (7,), greedy(6)))
        ended = [output.request_id for output in engine.step() if isinstance(output, ScoreOutput) or output.is_last]
        engine.check_integrity()
        if request_id in ended:
            return at
    return max_steps


def test_a_scoring_that_fills_a_step_is_not_starved(tiny_models: dict[str, Path]) -> None:
    """Candidates run in one step; rows that decode must not keep that step from ever being empty enough."""
    engine = make_engine(tiny_models["llama"], max_num_batched_tokens=12, max_num_seqs=4)
    for number in range(3):
        engine.add_request(GenerateRequest(f"first-{number}", (9, 8), greedy(4 + number)))
    engine.step()
    engine.add_request(ScoreRequest("big", TEXT, (tuple(range(5, 17)),)))
    assert steps_until(engine, "big", crowd=3) < 20


def test_strict_chunks_are_not_starved(tiny_models: dict[str, Path]) -> None:
    """Strict mode runs chunks of a fixed size or none; newcomers wait for the row that finds no room for its chunk."""
    engine = make_engine(tiny_models["llama"], strict=True, max_num_batched_tokens=6, max_num_seqs=6)
    for number in range(5):
        engine.add_request(GenerateRequest(f"first-{number}", (9,), greedy(3 + number)))
    engine.step()
    engine.add_request(GenerateRequest("long", TEXT, greedy(2), (library(tiny_models["llama"])[3],)))
    assert steps_until(engine, "long", crowd=3) < 60


@pytest.mark.parametrize(("most", "largest"), [(None, 33), (11, 12), (2048, 201)])
def test_who_writes_is_not_held_up(tiny_models: dict[str, Path], most: int | None, largest: int) -> None:
    """Long texts beside a row that writes are read in pieces, but for candidates, which cannot be cut.

    The control has no such limit: the writer's next token waits for all of both. Alone a text is read whole.
    """
    engine = make_engine(tiny_models["llama"], max_num_seqs=4, num_blocks=64, max_num_mixed_tokens=most)
    text, sizes, answers = TEXT * 5, list[int](), dict[str, tuple[int, ...]]()
    engine.add_request(GenerateRequest("alone", text, greedy(1)))
    (alone,) = engine.step()
    assert engine.stats().last_step_num_tokens == len(text)
    engine.add_request(GenerateRequest("writer", (9, 8), greedy(40)))
    (begun,) = engine.step()
    assert isinstance(begun, RequestOutput)
    answers["writer"] = begun.token_ids
    engine.add_request(GenerateRequest("reader", (6, *text[1:]), greedy(1)))
    engine.add_request(ScoreRequest("scored", (7, *text[1:]), (TEXT,)))  # its candidate cannot be cut
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestOutput):
                answers[output.request_id] = answers.get(output.request_id, ()) + output.token_ids
        sizes.append(engine.stats().last_step_num_tokens)
        engine.check_integrity()
    assert isinstance(alone, RequestOutput) and alone.is_last
    assert (len(answers["writer"]), len(answers["reader"])) == (40, 1)
    assert max(sizes) == largest


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_source_brings_its_first_token(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Beside a row that writes, too: a source is read whole in any case, and its target begins in the same step."""
    engine = make_engine(tiny_seq2seq[family], max_num_mixed_tokens=12)
    engine.add_request(GenerateRequest("writer", (9, 8), greedy(9)))
    engine.step()
    engine.add_request(GenerateRequest("reader", TEXT * 2, greedy(2)))
    assert {output.request_id for output in engine.step()} == {"writer", "reader"}


def test_a_gpu_reads_more_beside_rows_that_write() -> None:
    """It computes some hundreds of tokens in the time of one; what is said holds everywhere."""
    plain, said = EngineConfig(), EngineConfig(max_num_mixed_tokens=40)
    for num_writing, num_unread, on_cpu, on_gpu in (
        (1, 9, 32, 512),
        (16, 800, 100, 512),
        (16, 8000, 256, 512),
        (64, 9, 96, 512),
        (512, 8000, 768, 768),
    ):
        assert plain.num_mixed_tokens(num_writing, num_unread, on_gpu=False) == on_cpu
        assert plain.num_mixed_tokens(num_writing, num_unread, on_gpu=True) == on_gpu
        assert said.num_mixed_tokens(num_writing, num_unread, on_gpu=num_writing > 1) == 40
    with pytest.raises(InvalidRequestError, match="max_num_mixed_tokens must be at least 1, got 0"):
        EngineConfig(max_num_mixed_tokens=0)


@pytest.mark.parametrize("num_blocks", [8, 12])
def test_a_preempted_row_comes_back(tiny_models: dict[str, Path], num_blocks: int) -> None:
    """In a pool for hardly more than one long row, older rows end first, however many newcomers there are."""
    engine = make_engine(tiny_models["llama"], num_blocks=num_blocks, block_size=4, max_num_seqs=4)
    for number in range(3):
        engine.add_request(GenerateRequest(f"long-{number}", (5, 6, 7), greedy(29)))
    ended: list[RequestOutput] = []
    for at in range(400):
        if len(engine.scheduler.waiting) < 4:
            engine.add_request(GenerateRequest(f"small-{at}", (7,), greedy(2)))
        ended += [output for output in engine.step() if isinstance(output, RequestOutput) and output.is_last]
        engine.check_integrity()
        if any(output.request_id == "long-2" for output in ended):
            break
    assert [one.request_id for one in ended if one.request_id.startswith("long")] == ["long-0", "long-1", "long-2"]
    assert engine.stats().preemptions > 0
    assert not any(one.num_cached_tokens for one in ended), "a row's own blocks are no cache hit"
