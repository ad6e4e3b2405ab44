"""T5 and BART: any mix of prompts, joins and leaves equals transformers' own forward, one request at a time."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promptd_store import PromptArtifact
from promptd_store.passing_thread import in_passing_thread
from transformers import AutoModelForSeq2SeqLM, MT5Config, MT5ForConditionalGeneration

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, PoolRequest, SamplingParams, ScoreRequest
from promptd.errors import ContextLengthError, InvalidRequestError, NumericalError
from promptd.llm import LLM
from promptd.modeling import load_model
from tests.engine.harness import Case, assert_greedy, greedy, make_engine, run
from tests.engine.seq2seq_oracle import FIRST, LAST, Row, library, oracle
from tests.family_models import SEQ2SEQ, T5_SIZES, make_encoder_tokenizer, write_model

#: Limits that bring out sources that wait for room, eviction of prefixes and preemption of rows.
LIMITS = {
    "roomy": {},
    "crowded": {
        "num_blocks": 15,
        "block_size": 4,
        "prompt_tokens": 36,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 6,
    },
}


def text(rng: random.Random, length: int) -> tuple[int, ...]:
    """Token ids of a text between its two special tokens."""
    return (FIRST, *(rng.randrange(1, 300) for _ in range(length)), LAST)


def start_of(folder: Path) -> tuple[int, ...]:
    """What targets begin with."""
    config = oracle(folder).generation_config
    forced = config.forced_bos_token_id
    return (config.decoder_start_token_id, *([] if forced is None else [forced]))


def assert_matches_oracle(folder: Path, case: Case) -> None:
    """Tokens are those that the oracle would take behind the same beginning."""
    if case.tokens:
        logits = Row(folder, case.prompts, case.token_ids).logits_of(start_of(folder), case.tokens)
        assert_greedy(case.tokens, logits, [prompt.kind.value for prompt in case.prompts])


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", SEQ2SEQ)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), max_size=2),
            st.integers(0, 24),
            st.integers(1, 10),
            st.integers(0, 8),
            st.none() | st.none() | st.integers(1, 12),
            st.integers(0, 99),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_any_mix_equals_one_at_a_time(
    tiny_seq2seq: dict[str, Path],
    family: str,
    limits: str,
    drawn: list[tuple[list[int], int, int, int, int | None, int]],
) -> None:
    """Soft prompts, texts and prefixes of one or of three banks, chains and bare rows that join and leave at any step,
    are cancelled, evicted and preempted: each request gets the tokens that transformers gives it alone."""
    folder = tiny_seq2seq[family]
    prompts = library(folder)
    cases = [
        Case(tuple(prompts[n] for n in chain), text(random.Random(seed), length), greedy(count), arrives, aborts)
        for chain, length, count, arrives, aborts, seed in drawn
    ]
    run(make_engine(folder, **LIMITS[limits]), cases)  # type: ignore[arg-type]
    for case in cases:
        if case.aborts is None:
            assert len(case.tokens) == case.params.max_tokens
        assert_matches_oracle(folder, case)


def test_mt5_equals_transformers(tmp_path: Path) -> None:
    """Its classes and its configuration are its own: what it says is not scaled, and no field tells so."""
    config = MT5Config(**{**T5_SIZES, "feed_forward_proj": "gated-gelu"})
    folder = write_model(lambda: MT5ForConditionalGeneration(config), make_encoder_tokenizer(), tmp_path / "mt5")
    prompts = ((), *((prompt,) for prompt in library(folder)))
    cases = [Case(chain, text(random.Random(n), 9 + n), greedy(6), n // 3) for n, chain in enumerate(prompts)]
    run(make_engine(folder), cases)
    for case in cases:
        assert_matches_oracle(folder, case)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_swap_of_two_prompts_is_seen(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Control: with another prompt, or without one of a prefix's banks, the first logits are others."""
    folder = tiny_seq2seq[family]
    prompts = library(folder)
    ids, start = text(random.Random(1), 14), start_of(folder)
    rows = [(), *((prompt,) for prompt in prompts)]
    logits = [Row(folder, chain, ids).logits(start)[-1] for chain in rows]
    if family.startswith("t5"):  # relative positions do not notice where the text begins
        del logits[9]
    for at, one in enumerate(logits):
        for other in logits[:at]:
            assert (one - other).abs().max() > 1e-2 * one.abs().max()
    whole = Row(folder, (prompts[5],), ids)
    for bank in ("target", "source", "cross"):
        lacking = Row(folder, (prompts[5],), ids)
        del lacking.banks[bank]
        assert (lacking.logits(start) - whole.logits(start)).abs().max() > 1e-2 * whole.logits(start).abs().max()


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_tiny_models_are_lively(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """The answers compared above differ between prompts and texts, and are not one repeated token."""
    folder = tiny_seq2seq[family]
    cases = [Case((prompt,), text(random.Random(n), 12), greedy(8)) for n, prompt in enumerate(library(folder))]
    run(make_engine(folder), cases)
    answers = [tuple(case.tokens) for case in cases]
    assert len(set(answers)) >= len(answers) - 1
    assert sum(len(set(answer)) > 2 for answer in answers) >= len(answers) // 2


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_crowded_engine_preempts_and_evicts(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """A row that lost its blocks reads its source again and goes on as if nothing had been."""
    folder = tiny_seq2seq[family]
    order = (0, 3, 1, 5, 4, 6, 2)
    cases = [Case((library(folder)[order[n % 7]],), text(random.Random(n), 14), greedy(16), n // 3) for n in range(12)]
    engine = make_engine(folder, **{**LIMITS["crowded"], "prompt_tokens": 24})  # type: ignore[arg-type]
    run(engine, cases)
    for case in cases:
        assert_matches_oracle(folder, case)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prompt_cache_evictions > 0
    assert engine.blocks.num_used == 0


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_scores_of_candidates(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Candidates of one and of several tokens, under different prompts: the sums of transformers' log-probabilities."""
    folder = tiny_seq2seq[family]
    candidates, start = ((7,), (9, 30, 31), (200, 5)), start_of(folder)
    engine = make_engine(folder)
    rows = [((), 5), *(((prompt,), 3 + 2 * n) for n, prompt in enumerate(library(folder)))]
    texts = [text(random.Random(length), length) for _, length in rows]
    for n, (chain, _) in enumerate(rows):
        engine.add_request(ScoreRequest(str(n), texts[n], candidates, chain))
    found = {}
    while engine.has_work:
        found |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    for n, (chain, _) in enumerate(rows):
        row = Row(folder, chain, texts[n])
        for candidate, score in zip(candidates, found[str(n)].logprobs, strict=True):  # type: ignore[union-attr]
            logits = row.logits((*start, *candidate[:-1]))[len(start) - 1 :]
            expected = logits.log_softmax(-1)[range(len(candidate)), list(candidate)].sum()
            assert score == pytest.approx(expected.item(), abs=1e-3 * len(candidate))


def test_positions_are_never_compared_over_the_packed_length(
    tiny_seq2seq: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5's own `compute_bias` would make heads x tokens x tokens of the packed batch; it is never called."""
    folder = tiny_seq2seq["t5"]
    model = load_model(folder)
    attention = type(model.hf.encoder.block[0].layer[0].SelfAttention)

    def forbidden(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("a bias for the whole packed length")

    monkeypatch.setattr(attention, "compute_bias", forbidden)
    engine = Engine(model, EngineConfig(kv_cache_bytes=1 << 22, prompt_cache_bytes=1 << 20))
    cases = [Case((), text(random.Random(n), 20), greedy(3)) for n in range(6)]
    run(engine, cases)
    assert all(len(case.tokens) == 3 for case in cases)
    with pytest.raises(AssertionError, match="whole packed length"):  # control: transformers' own forward calls it
        AutoModelForSeq2SeqLM.from_pretrained(folder)(
            input_ids=torch.tensor([[1]]), decoder_input_ids=torch.tensor([[1]])
        )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_strict_rows_have_the_same_bits_alone_and_mixed(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """`strict`: the log-probabilities of a row are bitwise equal whatever else is in the batch."""
    folder = tiny_seq2seq[family]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
    cases = [Case((prompt,), text(random.Random(n), 2 + 3 * n), params, n) for n, prompt in enumerate(library(folder))]
    run(make_engine(folder, strict=True), cases)
    for case in cases:
        alone = Case(case.prompts, case.token_ids, params)
        run(make_engine(folder, strict=True), [alone])
        bits = [[output.logprobs for output in one.outputs] for one in (alone, case)]  # type: ignore[union-attr]
        assert bits[0] == bits[1]


def test_errors_are_typed_and_hurt_one_row(tiny_seq2seq: dict[str, Path]) -> None:
    """Too long sources and targets apart, echo, embeddings; a source of NaNs ends its own row only."""
    folder = tiny_seq2seq["bart"]
    engine = make_engine(folder)
    short = text(random.Random(1), 4)
    with pytest.raises(ContextLengthError, match="120"):
        engine.add_request(GenerateRequest("a", text(random.Random(1), 119), greedy(1)))
    with pytest.raises(ContextLengthError, match="120"):
        engine.add_request(GenerateRequest("b", short, greedy(120)))
    with pytest.raises(InvalidRequestError, match="echo"):
        engine.add_request(GenerateRequest("c", short, SamplingParams(prompt_logprobs=1)))
    with pytest.raises(InvalidRequestError, match="embedding"):
        engine.add_request(PoolRequest("d", short, "embedding"))
    fits = Case((), text(random.Random(1), 118), greedy(119))  # 120 source tokens, a start and 119 more
    poison: PromptArtifact = library(folder)[0]
    bad = Case((poison,), short, greedy(4))
    poison.tensors["prompt_embeddings"].fill_(torch.nan)
    good = Case((library(folder)[1],), short, greedy(4))
    try:
        run(engine, [fits, bad, good])
    finally:
        library.cache_clear()
    assert isinstance(bad.outputs[-1].error, NumericalError)
    assert len(fits.tokens) == 119
    assert_matches_oracle(folder, good)
    assert engine.blocks.num_used == 0


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_two_threads_run_one_model(tiny_seq2seq: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """A job that begins computes beside the engine: right when a pass has told its positions, another one runs."""
    model = replace(load_model(tiny_seq2seq[family]), step_graph=None)  # a recorded step asks for its arguments alone
    short, long = ("the quick brown fox", "the lazy dog plays some music for two people near the river")

    def answer(text: str) -> tuple[int, ...]:
        (completion,) = LLM(model).generate([text], params=greedy(4))
        return tuple(completion.token_ids)

    alone, place, engine = (answer(short), answer(long)), model.family.place, threading.current_thread()
    beside: list[tuple[int, ...]] = []

    def placed(positions: torch.Tensor) -> None:
        place(positions)
        if threading.current_thread() is engine:
            beside.append(in_passing_thread(answer, long))

    monkeypatch.setattr(model.family, "place", placed)
    assert answer(short) == alone[0]
    assert len(beside) > 4 and set(beside) == {alone[1]}


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_half_precision_is_served(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Loading proves that packed rows are transformers' own in bfloat16, too."""
    assert load_model(tiny_seq2seq[family], dtype="bfloat16").dtype is torch.bfloat16
