"""Design invariant 1: a request's answer is the same alone and in any mix."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptd.engine.request import SamplingParams
from tests.engine.harness import (
    Case,
    assert_matches_oracle,
    frozen,
    greedy,
    library,
    make_engine,
    run,
)
from tests.tiny_models import FAMILIES, VOCAB_SIZE

#: Limits that bring out chunked prefill, eviction of prompts, preemption of rows and reuse of text prefixes.
LIMITS = {
    "roomy": {},
    "chunked": {"max_num_batched_tokens": 9, "max_num_seqs": 4},
    "crowded": {"num_blocks": 24, "block_size": 4, "prompt_tokens": 60, "max_num_batched_tokens": 24},
}


@dataclass(frozen=True)
class Drawn:
    """One request as hypothesis draws it."""

    chain: tuple[int, ...]
    length: int
    max_tokens: int
    arrives: int
    aborts: int | None
    seed: int
    shares_text: bool


DRAWN = st.builds(
    Drawn,
    chain=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    length=st.integers(1, 40),
    max_tokens=st.integers(1, 12),
    arrives=st.integers(0, 8),
    aborts=st.none() | st.none() | st.integers(1, 12),
    seed=st.integers(0, 1 << 16),
    shares_text=st.booleans(),
)


def make_case(folder: Path, drawn: Drawn) -> Case:
    """Turn a drawn request into a case for one model."""
    prompts = tuple(library(folder)[number] for number in drawn.chain)
    rng = random.Random(1 if drawn.shares_text else drawn.seed)  # shared texts meet in the prefix cache
    tokens = tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(drawn.length))
    return Case(prompts, tokens, greedy(drawn.max_tokens), drawn.arrives, drawn.aborts)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(DRAWN, min_size=2, max_size=10))
def test_any_mix_equals_one_at_a_time(
    tiny_models: dict[str, Path], family: str, limits: str, drawn: list[Drawn]
) -> None:
    """Random mixes of soft, prefix, text, chained and bare rows, with joins, leaves, cancels, chunks, evictions
    and preemptions, give each request the tokens that transformers gives it alone; every pool stays consistent."""
    folder = tiny_models[family]
    cases = [make_case(folder, one) for one in drawn]
    run(make_engine(folder, **LIMITS[limits]), cases)  # type: ignore[arg-type]
    for case in cases:
        if case.aborts is None:
            assert case.outputs[-1].is_last  # type: ignore[union-attr]
            assert len(case.tokens) == case.params.max_tokens
        assert_matches_oracle(folder, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_swap_of_two_prompts_is_seen(tiny_models: dict[str, Path], family: str) -> None:
    """Control: when two rows of a batch get each other's prompt, the comparison above fails."""
    folder = tiny_models[family]
    soft, prefix = library(folder)[2], library(folder)[6]
    tokens = tuple(range(5, 25))
    served = [Case((soft,), tokens, greedy(8)), Case((prefix,), tokens, greedy(8))]
    run(make_engine(folder), served)
    for case in served:
        assert_matches_oracle(folder, case)
    served[0].prompts, served[1].prompts = served[1].prompts, served[0].prompts
    for case in served:
        with pytest.raises(AssertionError):
            assert_matches_oracle(folder, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_are_lively(tiny_models: dict[str, Path], family: str) -> None:
    """The answers compared above differ between prompts and are not one repeated token."""
    folder = tiny_models[family]
    cases = [Case((prompt,), tuple(range(5, 25)), greedy(12)) for prompt in library(folder)]
    run(make_engine(folder), cases)
    answers = [tuple(case.tokens) for case in cases]
    assert len(set(answers)) >= len(answers) - 1
    assert sum(len(set(answer)) > 2 for answer in answers) >= len(answers) // 2


@pytest.mark.parametrize("limits", ["chunked", "crowded"])
def test_the_limits_bring_out_what_they_should(tiny_models: dict[str, Path], limits: str) -> None:
    """The crowded engine really preempts, evicts and reuses prefixes; the chunked one really cuts texts."""
    folder = tiny_models["llama"]
    rng = random.Random(3)
    cases = [
        Case((library(folder)[n % 10],), tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(24)), greedy(12), n // 3)
        for n in range(12)
    ]
    cases += [Case(case.prompts, case.token_ids, case.params, case.arrives + 30) for case in cases[-3:]]
    engine = make_engine(folder, **LIMITS[limits])  # type: ignore[arg-type]
    run(engine, cases)
    stats = engine.stats()
    for case in cases:
        assert_matches_oracle(folder, case)
    if limits == "crowded":
        assert stats.preemptions > 0
        assert stats.prompt_cache_evictions > 0
        assert stats.cached_tokens > 0
    else:
        assert stats.steps > sum(24 for _ in cases) / 9


def test_strict_chains_load_in_order(tiny_models: dict[str, Path]) -> None:
    """A soft prompt in fixed chunks, a prefix (there at once) and a soft prompt behind both: the last is computed
    when the first is whole, not when its neighbour is."""
    folder = tiny_models["llama"]
    prompts = library(folder)
    case = Case((prompts[3], prompts[4], prompts[2]), tuple(range(5, 25)), greedy(8))
    engine = make_engine(folder, strict=True, max_num_batched_tokens=16, max_num_seqs=4)
    run(engine, [case])
    assert len(case.tokens) == 8
    assert_matches_oracle(folder, case)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_strict_rows_have_the_same_bits_alone_and_mixed(tiny_models: dict[str, Path], quantization: str) -> None:
    """`strict`: the log-probabilities of a row are bitwise equal whatever else is in the batch, in 8 bits, too."""
    folder = tiny_models["gpt2"]
    rng = random.Random(5)
    cases = [
        Case((library(folder)[n],), tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(3 + 5 * n)), logged(8), n)
        for n in range(8)
    ]
    run(make_engine(folder, strict=True, quantization=quantization), cases)
    for case in cases:
        alone = Case(case.prompts, case.token_ids, case.params)
        run(make_engine(folder, strict=True, quantization=quantization), [alone])
        assert bits(alone) == bits(case)


def logged(max_tokens: int) -> SamplingParams:
    """Greedy with log-probabilities."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=3)


def bits(case: Case) -> list[object]:
    """Every log-probability of a case, exactly."""
    return [logprob for output in case.outputs for logprob in output.logprobs]  # type: ignore[union-attr]


def test_the_base_model_is_frozen(tiny_models: dict[str, Path]) -> None:
    """Design invariant 8, serving side: a batch of everything leaves every weight as it was."""
    folder = tiny_models["llama"]
    before = frozen(folder).digest()
    run(make_engine(folder), [Case((prompt,), (5, 6, 7), greedy(4)) for prompt in library(folder)])
    assert frozen(folder).digest() == before
