"""A step is begun before the one before has landed: the answers are those of an engine that waits for each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from promptd.engine.async_engine import AsyncEngine
from promptd.engine.engine import Engine, Output
from promptd.engine.request import (
    GenerateRequest,
    Request,
    RequestOutput,
    SamplingParams,
    ScoreOutput,
    ScoreRequest,
)
from promptd.modeling import PackedBatch
from tests.engine.harness import Case, assert_matches_oracle, greedy, library, make_engine, run
from tests.family_models import SEQ2SEQ

WORDS = tuple(range(5, 60))


@dataclass
class Told:
    """What an engine said of one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: Any = None
    end: Any = None

    def hear(self, output: Output) -> None:
        """Add an answer or a part of one."""
        assert self.end is None, "nothing comes after the end"
        if isinstance(output, RequestOutput):
            self.tokens += output.token_ids
            self.text += output.text
            self.logprobs += output.logprobs
            self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
            self.end = (output.finish_reason, output.stop_reason) if output.is_last else None
        elif isinstance(output, ScoreOutput):
            self.end = output.token_logprobs


def params_of(dice: random.Random) -> SamplingParams:
    """Any way of picking tokens, many of which end early."""
    kind = dice.choice(["greedy", "drawn", "drawn", "penalty", "logprobs", "echo", "stop", "bias", "ends"])
    most = dice.choice([0, 1, 2, 9, 24]) if kind == "echo" else dice.choice([1, 2, 9, 24])
    base = {"max_tokens": most, "seed": dice.randrange(1000), "temperature": dice.choice([0.0, 0.7, 1.5])}
    more: dict[str, dict[str, Any]] = {
        "drawn": {"top_p": dice.choice([0.5, 1.0]), "top_k": dice.choice([0, 20]), "min_p": dice.choice([0, 0.05])},
        "penalty": {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": -0.2},
        "logprobs": {"logprobs": 3},
        "echo": {"prompt_logprobs": 2, "logprobs": 1},
        "stop": {"stop": ("a", " t"), "min_tokens": min(most, 2)},
        "bias": {"logit_bias": {7: 2.5}},
        "ends": {"stop_token_ids": tuple(dice.sample(range(300), 60)), "ignore_eos": True},
    }
    return SamplingParams(**{**base, **more.get(kind, {})})


def requests_of(folder: Path, seed: int, count: int) -> list[tuple[int, int | None, Request]]:
    """Requests with the steps in which they come, and are given up."""
    dice, prompts = random.Random(seed), library(folder)
    found: list[tuple[int, int | None, Request]] = []
    for number in range(count):
        text = tuple(dice.choices(WORDS, k=dice.choice([1, 2, 7, 30])))
        chain = tuple(dice.sample(prompts, dice.choice([0, 0, 1, 2])))
        request: Request = GenerateRequest(f"r{number}", text, params_of(dice), chain)
        if dice.random() < 0.15:
            request = ScoreRequest(f"r{number}", text, ((5, 6, 7), (8,), (9, 10)), chain)
        found.append((dice.randrange(20), dice.randrange(40) if dice.random() < 0.1 else None, request))
    return found


def answers(engine: Engine, requests: Sequence[tuple[int, int | None, Request]]) -> tuple[dict[str, Told], int]:
    """What the engine says of each, and how many steps began while another was in flight."""
    told = {request.request_id: Told() for _, _, request in requests}
    num_ahead = 0
    for at in range(3000):
        for arrives, leaves, request in requests:
            if arrives == at:
                engine.add_request(request)
            if leaves == at and arrives <= at:
                engine.abort(request.request_id)
                told[request.request_id].end = "aborted"
        for output in engine.step():
            told[output.request_id].hear(output)
        engine.check_integrity()
        num_ahead += engine._in_flight is not None
        if not engine.has_work and at > 20:
            return told, num_ahead
    raise AssertionError("it never ended")


def compared(folder: Path, seed: int, **limits: Any) -> tuple[dict[str, Told], dict[str, Told], int]:
    """The answers of an engine that runs ahead and of one that does not, and how often the first did."""
    requests = requests_of(folder, seed, 30)
    ahead, num_ahead = answers(make_engine(folder, runs_ahead=True, **limits), requests)
    waiting, none = answers(make_engine(folder, runs_ahead=False, **limits), requests)
    assert none == 0
    return ahead, waiting, num_ahead


def differing(ahead: dict[str, Told], waiting: dict[str, Told]) -> list[str]:
    """Who was told something else; of those that were given up only as far as both were told something."""
    found = []
    for name, one in ahead.items():
        other = waiting[name]
        common = min(len(one.tokens), len(other.tokens))
        is_told = "aborted" not in (one.end, other.end)
        if one.tokens[:common] != other.tokens[:common] or (is_told and one != other):
            found.append(name)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_answers(tiny_models: dict[str, Path], family: str, seed: int) -> None:
    """Bit for bit, with prompts, every way of picking tokens, scores, early ends and requests that are given up."""
    ahead, waiting, num_ahead = compared(tiny_models[family], seed, strict=True, max_num_seqs=6)
    assert num_ahead > 20
    assert sum(len(one.tokens) for one in ahead.values()) > 100
    assert differing(ahead, waiting) == []


@pytest.mark.parametrize("seed", range(3))
def test_preempted_rows_match_the_oracle(tiny_models: dict[str, Path], seed: int) -> None:
    """In a pool for a few rows only, where texts are found again: rows leave and come back with tokens in flight."""
    folder, dice = tiny_models["llama"], random.Random(seed)
    engine = make_engine(
        folder, runs_ahead=True, num_blocks=15, block_size=4, max_num_seqs=6, max_num_batched_tokens=24
    )
    cases = [
        Case(
            tuple(dice.sample(library(folder), dice.choice([0, 1, 2]))),
            tuple(dice.choices(WORDS, k=dice.choice([1, 7, 30]))),
            greedy(dice.choice([2, 9, 24])),
            arrives=dice.randrange(10),
        )
        for _ in range(20)
    ]
    run(engine, cases)
    assert engine.stats().preemptions > 0
    for case in cases:
        assert len(case.tokens) == case.params.max_tokens
        assert_matches_oracle(folder, case)


def test_no_step_is_run_in_vain(tiny_models: dict[str, Path]) -> None:
    """Whose last token is known to be the last is not run again, nor preempted for the step that is empty then."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True)
    run(engine, [Case((), (5, 6), greedy(5)), Case((), (7, 8), greedy(5))])
    assert (engine.stats().steps, engine.stats().preemptions) == (5, 0)
    longest = engine.max_model_len
    run(engine, [Case((), tuple(dice_text(longest - 3)), greedy(3))])


def dice_text(length: int) -> list[int]:
    """So many words."""
    return random.Random(length).choices(WORDS, k=length)


def test_a_done_row_gives_its_blocks_to_others(tiny_models: dict[str, Path]) -> None:
    """A row that finds no block waits for the landing of one that is done; none is preempted."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True, num_blocks=5, block_size=4)
    first, second = Case((), tuple(WORDS[:7]), greedy(2)), Case((), tuple(WORDS[:11]), greedy(9))
    run(engine, [first, second])
    assert engine.stats().preemptions == 0
    assert (len(first.tokens), len(second.tokens)) == (2, 9)


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_blocks_are_found_when_they_have_landed(tiny_models: dict[str, Path], runs_ahead: bool) -> None:
    """Not before: what is wrong with their step is not known yet. The control waits, and finds them at once.

    The last token of the third block is a decoded one: its block is full while the step that reads it is in flight.
    """
    engine = make_engine(tiny_models["llama"], runs_ahead=runs_ahead)
    engine.add_request(GenerateRequest("r", tuple(dice_text(47)), greedy(9)))

    def num_found() -> int:
        (seq,) = engine._sequences.values()
        found, _ = engine.blocks.match(engine.blocks.root(seq.prefix_key), seq.token_ids)
        engine.blocks.release(found)
        return len(found)

    counts = []
    for _ in range(3):
        engine.step()
        counts.append(num_found())
    assert counts == ([0, 2, 3] if runs_ahead else [2, 3, 3])


@pytest.mark.parametrize("judged", [True, False])
def test_a_text_that_is_judged_lands_at_once(tiny_models: dict[str, Path], judged: bool) -> None:
    """A row that were preempted now would read it again, and tell its tokens' log-probabilities twice."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=1 if judged else None)
    engine.add_request(GenerateRequest("r", tuple(dice_text(40)), params))
    for _ in range(3):
        engine.step()
        assert (engine._in_flight is None) == judged
    while engine.has_work:
        engine.step()


def test_without_the_device_the_token_is_another(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where tokens in flight are not put in their places, rows read something else."""
    monkeypatch.setattr(PackedBatch, "put_tokens", lambda *_: None)
    ahead, waiting, _ = compared(tiny_models["llama"], 0, strict=True, max_num_seqs=6)
    assert len(differing(ahead, waiting)) > 5


def test_newcomers_come_in_beside_scores_in_flight(tiny_models: dict[str, Path]) -> None:
    """A row that is done reads nothing more, and nobody waits for it to."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True)
    engine.add_request(ScoreRequest("scored", (5, 6), ((7, 8), (9,))))
    engine.step()
    assert engine._in_flight is not None
    engine.add_request(GenerateRequest("next", (5, 6), greedy(1)))
    (scored,) = engine.step()
    assert isinstance(scored, ScoreOutput)
    (answer,) = engine.step()
    assert (answer.request_id, answer.is_last) == ("next", True)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_targets_of_sources_too(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Encoder-decoders write ahead as well."""
    texts = [(f"r{number}", tuple(range(5, 9 + number))) for number in range(5)]
    found = []
    for runs_ahead in (True, False):
        engine = make_engine(tiny_seq2seq[family], runs_ahead=runs_ahead, max_num_seqs=3)
        asked: list[tuple[int, int | None, Request]] = [
            (0, None, GenerateRequest(name, text, greedy(8))) for name, text in texts
        ]
        found.append(answers(engine, asked))
    assert found[0][1] > 5 and differing(found[0][0], found[1][0]) == []


def test_a_row_that_fails_while_another_is_in_flight(tiny_models: dict[str, Path]) -> None:
    """A step that raises is run row by row, tokens in flight in their places; numbers that are none end one row."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True, strict=True)
    expected = make_engine(tiny_models["llama"], runs_ahead=False, strict=True)
    told: dict[str, dict[str, Told]] = {"ahead": {}, "waiting": {}}
    for label, one in (("ahead", engine), ("waiting", expected)):
        for number in range(3):
            one.add_request(GenerateRequest(f"r{number}", (5 + number, 9), greedy(12)))
            told[label][f"r{number}"] = Told()
        forward, calls = one._runner._model.forward_packed, 0

        def failing(batch: PackedBatch, forward: Any = forward, label: str = label) -> Any:
            nonlocal calls
            calls += 1
            if label == "ahead" and calls == 5:
                raise RuntimeError("once")
            logits = forward(batch)
            if label == "ahead" and calls == 10:
                logits[0] = torch.nan
            return logits

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(one._runner._model), "forward_packed", lambda _, batch: failing(batch))
            errors = []
            while one.has_work:
                for output in one.step():
                    if output.error is not None:
                        errors.append(output.request_id)
                    else:
                        told[label][output.request_id].hear(output)
                one.check_integrity()
        assert errors == (["r0"] if label == "ahead" else [])
    assert told["ahead"]["r1"] == told["waiting"]["r1"] and told["ahead"]["r2"] == told["waiting"]["r2"]
    assert told["ahead"]["r0"].tokens == told["waiting"]["r0"].tokens[: len(told["ahead"]["r0"].tokens)]


def test_erasing_waits_for_what_is_in_flight(tiny_models: dict[str, Path]) -> None:
    """Who is erased has ended behind it, with no step of theirs on its way; others lose nothing."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True)
    engine.add_request(GenerateRequest("theirs", (5, 6), greedy(6), salt="them"))
    engine.add_request(GenerateRequest("ours", (7, 8), greedy(6), salt="us"))
    outputs = engine.step() + engine.step()
    assert engine._in_flight is not None
    engine.erase("them", None)
    assert engine._in_flight is None
    while engine.has_work:
        outputs += engine.step()
    ended = {output.request_id: output.error for output in outputs if output.is_last}
    assert ended["ours"] is None and ended["theirs"] is not None
    ours = [output for output in outputs if output.request_id == "ours" and isinstance(output, RequestOutput)]
    assert sum(len(output.token_ids) for output in ours) == 6


class Spare:
    """Work behind every third step, in slices, which remembers whether a step was in flight when one began."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.wake: Any = None
        self.in_flight: list[bool] = []
        self._begins_at = 2

    @property
    def has_work(self) -> bool:
        """Whether there have been steps enough."""
        return self.engine.counters.steps >= self._begins_at

    def run(self, serve: Any) -> None:
        """Take two slices."""
        for _ in range(2):
            self.in_flight.append(self.engine._in_flight is not None)
            time.sleep(0.001)
            serve()
        self.in_flight.append(self.engine._in_flight is not None)
        self._begins_at = self.engine.counters.steps + 3


@pytest.mark.anyio
async def test_a_server_that_runs_ahead_beside_training(tiny_models: dict[str, Path]) -> None:
    """Streams end as they do elsewhere, no token waits for a slice, and what is told of the engine is not old."""
    engine = make_engine(tiny_models["llama"], runs_ahead=True, strict=True)
    spare = Spare(engine)
    server = AsyncEngine(engine, spare)
    server.start()
    expected = make_engine(tiny_models["llama"], runs_ahead=False, strict=True)
    for number in range(6):
        text = tuple(dice_text(3 + number))
        stream = server.submit(GenerateRequest(f"r{number}", text, greedy(8)))
        found = [token async for output in stream for token in output.token_ids]
        case = Case((), text, greedy(8))
        run(expected, [case])
        assert found == case.tokens
        for _ in range(1000):
            if server.stats().requests_finished == number + 1:
                break
            await asyncio.sleep(0.005)
        assert (server.stats().requests_finished, server.stats().num_requests_running) == (number + 1, 0)
    await server.shutdown()
    assert len(spare.in_flight) > 20 and not any(spare.in_flight)
