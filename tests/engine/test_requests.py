"""Both kinds of request, their limits, and how a bad row stays alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from promptd_store import encode

from promptd.engine.engine import Engine
from promptd.engine.request import (
    FinishReason,
    GenerateRequest,
    RequestOutput,
    SamplingParams,
    ScoreOutput,
    ScoreRequest,
)
from promptd.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidArtifactError,
    InvalidRequestError,
    NumericalError,
    OverloadedError,
    PromptdError,
)
from promptd.modeling.reference import ReferenceRow
from tests.engine.harness import (
    Case,
    assert_matches_oracle,
    chain_segments,
    frozen,
    greedy,
    library,
    make_engine,
    oracle,
    run,
)

TEXT = tuple(range(5, 25))


def finish(engine: Engine) -> list[RequestOutput | ScoreOutput]:
    """Step until nothing is left; check every pool after every step."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
    return outputs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("budget", [2048, 12])
def test_scores_equal_the_oracles(tiny_models: dict[str, Path], family: str, budget: int) -> None:
    """Log-probabilities of candidates of several lengths, in one pass beside other rows, are transformers' own."""
    folder = tiny_models[family]
    engine = make_engine(folder, max_num_batched_tokens=budget, max_num_seqs=8)
    candidates = ((7,), (8, 9), (10, 11, 12), (7, 8))
    chains = [(), (library(folder)[2],), (library(folder)[5], library(folder)[1])]
    for number, chain in enumerate(chains):
        engine.add_request(ScoreRequest(f"s{number}", TEXT, candidates, chain))
        engine.add_request(GenerateRequest(f"g{number}", TEXT[:9], greedy(4), chain))
    outputs = {o.request_id: o for o in finish(engine) if isinstance(o, ScoreOutput)}
    for number, chain in enumerate(chains):
        for candidate, score in zip(candidates, outputs[f"s{number}"].logprobs, strict=True):
            row = ReferenceRow(oracle(folder), chain_segments(frozen(folder), chain))  # type: ignore[arg-type]
            logprobs = torch.log_softmax(row.extend([*TEXT, *candidate]), -1)
            expected = sum(float(logprobs[len(TEXT) - 1 + n, token]) for n, token in enumerate(candidate))
            assert score == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("budget", [2048, 7])
def test_prompt_logprobs_equal_the_oracles(tiny_models: dict[str, Path], budget: int) -> None:
    """`echo` with `logprobs`: one entry a text token, None for the first, whole or in chunks, never from the cache."""
    folder = tiny_models["llama"]
    engine = make_engine(folder, max_num_batched_tokens=budget, max_num_seqs=4)
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=2, logprobs=0, ignore_eos=True)
    prompt = library(folder)[2]
    cases = [Case((prompt,), TEXT, greedy(1)), Case((prompt,), TEXT, params, arrives=5)]
    run(engine, cases)
    (noted,) = [o.prompt_logprobs for o in cases[1].outputs if o.prompt_logprobs]  # type: ignore[union-attr]
    logits = ReferenceRow(oracle(folder), chain_segments(frozen(folder), [prompt])).extend(TEXT)  # type: ignore[arg-type]
    expected = torch.log_softmax(logits, -1)
    assert noted[0] is None
    for at, entry in enumerate(noted[1:], start=1):
        assert entry is not None
        assert entry.token_id == TEXT[at]
        assert entry.logprob == pytest.approx(float(expected[at - 1, TEXT[at]]), abs=1e-3)
        assert len(entry.top) == 2


def test_max_tokens_zero_only_reads(tiny_models: dict[str, Path]) -> None:
    """max_tokens=0 makes no token and still reports the text's log-probabilities."""
    case = Case((), TEXT, SamplingParams(max_tokens=0, prompt_logprobs=0))
    run(make_engine(tiny_models["gpt2"]), [case])
    (output,) = case.outputs
    assert isinstance(output, RequestOutput)
    assert output.token_ids == ()
    assert output.finish_reason is FinishReason.LENGTH
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(TEXT)


def test_stops(tiny_models: dict[str, Path]) -> None:
    """EOS, stop token ids, stop strings and max_tokens end a row with the right reason and text."""
    folder = tiny_models["llama"]
    free = Case((), TEXT, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    run(make_engine(folder), [free])
    text = "".join(o.text for o in free.outputs)  # type: ignore[union-attr]
    third = free.tokens[2]
    until = free.tokens.index(third)
    by_id = Case((), TEXT, SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(third,)))
    ascii_part = next(text[at : at + 2] for at in range(len(text)) if text[at : at + 2].isascii() and at > 0)
    by_text = Case((), TEXT, SamplingParams(max_tokens=12, temperature=0, stop=(ascii_part,), ignore_eos=True))
    run(make_engine(folder), [by_id, by_text])
    assert by_id.tokens == free.tokens[: until + 1]
    last = by_id.outputs[-1]
    assert isinstance(last, RequestOutput)
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, third)
    assert "".join(o.text for o in by_text.outputs) == text[: text.index(ascii_part)]  # type: ignore[union-attr]
    assert by_text.outputs[-1].stop_reason == ascii_part  # type: ignore[union-attr]
    assert free.outputs[-1].finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]


def test_a_poisoned_prompt_hurts_only_itself(tiny_models: dict[str, Path]) -> None:
    """Design invariant 4: NaN and overflow in one row end that row with a typed error; the others give the same
    tokens as without it, the next user of its slots too, and the poisoned K/V does not stay resident."""
    folder = tiny_models["gpt2"]
    spec = frozen(folder).spec
    nan = encode("soft", torch.full((4, spec.hidden_size), float("nan")))
    huge = encode("prefix", torch.full((spec.num_layers, 2, spec.num_kv_heads, 3, spec.head_dim), 3e38))
    engine = make_engine(folder, num_blocks=16)
    good = [Case((prompt,), TEXT, greedy(6), arrives=n % 3) for n, prompt in enumerate(library(folder)[:6])]
    bad = [Case((nan,), TEXT, greedy(6), arrives=1), Case((huge,), TEXT, greedy(6), arrives=1)]
    run(engine, [*good, *bad])
    for case in bad:
        (output,) = case.outputs
        assert isinstance(output.error, NumericalError)
    for case in good:
        assert_matches_oracle(folder, case)
    assert engine.stats().numerical_errors == 2
    after = [Case((), tuple(range(30, 60)), greedy(6)) for _ in range(4)]
    run(engine, after)  # reuses the freed slots
    for case in after:
        assert_matches_oracle(folder, case)


def test_a_row_that_raises_in_the_model_fails_alone(tiny_models: dict[str, Path]) -> None:
    """An exception caused by one row is that row's typed error; the batch is replayed without it."""
    folder = tiny_models["llama"]
    engine = make_engine(folder)
    good = [Case((prompt,), TEXT, greedy(5)) for prompt in library(folder)[:3]]
    bad = Case((), (6, 7), greedy(5))
    for number, case in enumerate([good[0], bad, *good[1:]]):
        engine.add_request(GenerateRequest(f"r{number}", case.token_ids, case.params, case.prompts))
    list(engine.scheduler.waiting)[1].token_ids[1] = 10**6  # past every check: the embedding lookup raises
    outputs = finish(engine)
    (failed,) = [o for o in outputs if o.error is not None]
    assert failed.request_id == "r1" and isinstance(failed.error, PromptdError)
    for number, case in zip((0, 2, 3), good, strict=True):
        case.outputs = [o for o in outputs if o.request_id == f"r{number}"]
        assert len(case.tokens) == 5
        assert_matches_oracle(folder, case)


def test_what_can_never_run_is_refused_at_once(tiny_models: dict[str, Path]) -> None:
    """Too long, empty, out of the vocabulary, made for another model: a typed error before anything is queued."""
    folder = tiny_models["llama"]
    engine = make_engine(folder, prompt_tokens=40, max_queue=1)
    spec = frozen(folder).spec
    wrong = encode("soft", torch.zeros(2, spec.hidden_size + 1))
    long_chain = (library(folder)[7], library(folder)[3], library(folder)[6])
    cases: list[tuple[type[Exception], GenerateRequest | ScoreRequest]] = [
        (ContextLengthError, GenerateRequest("a", tuple(range(5, 205)), greedy(60))),
        (ContextLengthError, GenerateRequest("a", tuple(range(5, 205)), greedy(50), (library(folder)[2],))),
        (InvalidRequestError, GenerateRequest("a", (), greedy(5))),
        (InvalidRequestError, GenerateRequest("a", (5, 320), greedy(5))),
        (InvalidRequestError, GenerateRequest("a", (-1,), greedy(5))),
        (InvalidRequestError, GenerateRequest("a", (5,), SamplingParams(logit_bias={320: 1.0}))),
        (InvalidArtifactError, GenerateRequest("a", (5,), greedy(5), (wrong,))),
        (InvalidRequestError, GenerateRequest("a", (5,), greedy(5), long_chain)),
        (InvalidRequestError, ScoreRequest("a", (5,), ())),
        (InvalidRequestError, ScoreRequest("a", (5,), ((),))),
    ]
    for expected, request in cases:
        with pytest.raises(expected):
            engine.add_request(request)
    assert not engine.has_work
    engine.add_request(GenerateRequest("a", tuple(range(5, 205)), greedy(56)))  # control: exactly 256 fits
    with pytest.raises(OverloadedError) as caught:
        engine.add_request(GenerateRequest("b", (5,), greedy(5)))
    assert caught.value.retry_after_seconds == 1


def test_deadlines_end_waiting_and_running_rows(tiny_models: dict[str, Path]) -> None:
    """A request past its deadline ends with a typed error at the next step; the others go on."""
    engine = make_engine(tiny_models["llama"], max_num_seqs=2)
    engine.add_request(GenerateRequest("late", TEXT, greedy(50), deadline_seconds=0.0))
    engine.add_request(GenerateRequest("good", TEXT, greedy(5)))
    outputs = finish(engine)
    (late,) = [o for o in outputs if o.request_id == "late"]
    assert isinstance(late.error, DeadlineExceededError)
    assert sum(o.request_id == "good" for o in outputs) == 5


def test_every_request_ends_once(tiny_models: dict[str, Path]) -> None:
    """Design invariant 3: exactly one last output for every request that was not aborted, none for those that were."""
    engine = make_engine(tiny_models["llama"], num_blocks=12, max_num_seqs=3)
    cases = [Case((), TEXT, greedy(1 + n), arrives=n, aborts=n + 1 if n % 3 == 0 else None) for n in range(9)]
    run(engine, cases)
    for case in cases:
        num_last = sum(output.is_last for output in case.outputs)  # type: ignore[union-attr]
        assert num_last == 1 or (case.aborts is not None and num_last == 0)
    stats = engine.stats()
    assert stats.kv_cache_usage_ratio == 0
    assert stats.requests_finished + stats.requests_aborted == 9


def let_time_pass(engine: Engine, seconds: float) -> None:
    """As if every request had come so much earlier."""
    for seq in (*engine.scheduler.waiting, *engine.scheduler.running):
        seq.arrived -= seconds


@pytest.mark.parametrize("limit", [60.0, None])
def test_who_waits_too_long_is_told_so(tiny_models: dict[str, Path], limit: float | None) -> None:
    """Not started in time: the typed error with Retry-After, once; the row that ran does not notice."""
    config = {} if limit is None else {"max_queue_seconds": limit}
    engine = make_engine(tiny_models["llama"], max_num_seqs=1, **config)  # type: ignore[arg-type]
    engine.add_request(GenerateRequest("runs", TEXT, greedy(20)))
    engine.step()
    engine.add_request(GenerateRequest("waits", TEXT, greedy(2)))
    engine.add_request(ScoreRequest("scores", TEXT, ((7,),)))
    let_time_pass(engine, 61)
    outputs = [output for _ in range(40) for output in engine.step()]
    engine.check_integrity()
    errors = {output.request_id: output.error for output in outputs if output.error is not None}
    assert set(errors) == (set() if limit is None else {"waits", "scores"})
    for error in errors.values():
        assert isinstance(error, OverloadedError)
        assert (error.code, error.retry_after_seconds) == ("queue_timeout", 1)
    assert sum(len(o.token_ids) for o in outputs if isinstance(o, RequestOutput) and o.request_id == "runs") == 19
    assert sum(output.is_last for output in outputs) == 3


@pytest.mark.parametrize("limit", [60.0, None])
def test_a_first_token_that_comes_too_late_does_not_come(tiny_models: dict[str, Path], limit: float | None) -> None:
    """A long text that is read in many steps ends at its deadline; a row with its first token goes on past it."""
    config = {} if limit is None else {"max_first_token_seconds": limit}
    engine = make_engine(tiny_models["llama"], max_num_seqs=2, max_num_batched_tokens=4, **config)  # type: ignore[arg-type]
    engine.add_request(GenerateRequest("quick", (5, 6), greedy(20)))
    engine.step()
    engine.add_request(GenerateRequest("long", tuple(range(5, 125)), greedy(2)))
    outputs = [output for _ in range(10) for output in engine.step()]
    let_time_pass(engine, 61)
    outputs += [output for _ in range(70) for output in engine.step()]
    engine.check_integrity()
    errors = {output.request_id: output.error for output in outputs if output.error is not None}
    assert set(errors) == (set() if limit is None else {"long"})
    assert all(error.code == "first_token_deadline_exceeded" for error in errors.values())
    assert sum(output.is_last for output in outputs) == 2


def test_deadlines_are_above_zero(tiny_models: dict[str, Path]) -> None:
    """A wrong one names itself."""
    for name in ("max_queue_seconds", "max_first_token_seconds"):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(InvalidRequestError) as refused:
                make_engine(tiny_models["llama"], **{name: value})  # type: ignore[arg-type]
            assert refused.value.param == name
