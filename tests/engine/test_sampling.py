"""How a row picks its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from promptd.engine.logprobs import top_logprobs
from promptd.engine.request import SamplingParams
from promptd.engine.sampler import SamplingRow, _cut_top_p, _cut_top_p_sorted, first_largest, sample, uniform
from promptd.errors import InvalidRequestError
from tests.engine.harness import Case, library, make_engine, run

Cut = Callable[[torch.Tensor, float], None]
LOGITS = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 2


def row(params: SamplingParams, outputs: tuple[int, ...] = (), seed: int = 0) -> SamplingRow:
    """One sampling row with made tokens `outputs`."""
    return SamplingRow(params, seed, (1, 2, 3), outputs, frozenset({0}))


def picked(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """What is drawn."""
    tokens: list[int] = sample(logits, rows).tolist()
    return tokens


def cut_sorted(probs: torch.Tensor, top_p: float) -> None:
    """The form for devices, of one row."""
    _cut_top_p_sorted(probs[None], torch.tensor([[top_p]]))


BOTH_CUTS = pytest.mark.parametrize("cut_top_p", [_cut_top_p, cut_sorted], ids=["split", "sorted"])


def frequencies(params: SamplingParams, num_draws: int = 4000) -> torch.Tensor:
    """How often each token is drawn."""
    rows = [row(params, seed=seed) for seed in range(num_draws)]
    counts = Counter(picked(LOGITS.repeat(num_draws, 1), rows))
    return torch.tensor([counts[token] / num_draws for token in range(len(LOGITS))])


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(temperature=1.0), []),
        (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (SamplingParams(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
        (SamplingParams(temperature=1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (SamplingParams(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
        (
            SamplingParams(temperature=1.3, top_k=12, top_p=0.8, min_p=0.05),
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)],
        ),
        (SamplingParams(temperature=1.0, repetition_penalty=1.8), [RepetitionPenaltyLogitsProcessor(1.8)]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all", "repetition"],
)
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams, warpers: list[object]) -> None:
    """Frequencies of 4,000 draws equal the probabilities after transformers' warpers; nothing outside is drawn."""
    scores = LogitsProcessorList(warpers)(torch.tensor([[1, 2, 3]]), LOGITS[None].clone())
    expected = torch.softmax(scores, -1)[0]
    found = frequencies(params)
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.9999])
@BOTH_CUTS
def test_top_p_of_a_large_vocabulary(scale: float, top_p: float, cut_top_p: Cut) -> None:
    """From flat to peaked: the set of transformers' warper, but for the rounding of the last place."""
    logits = torch.randn(30_000, generator=torch.Generator().manual_seed(4)) * scale
    expected = torch.isfinite(TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None].clone())[0])
    probs = torch.softmax(logits, -1)
    cut = probs.clone()
    cut_top_p(cut, top_p)
    assert float(probs[(cut > 0) != expected].sum()) <= 1e-5
    assert torch.equal(cut[cut > 0], probs[cut > 0])


@BOTH_CUTS
def test_top_p_of_equal_probabilities(cut_top_p: Cut) -> None:
    """Tokens that are equally likely stay or go together."""
    probs = torch.full((5_000,), 1 / 5_000)
    cut_top_p(probs, 0.5)
    assert int((probs > 0).sum()) == 5_000


def test_rows_without_a_cut_keep_all() -> None:
    """On a device, beside rows that are cut."""
    probs = torch.softmax(LOGITS.repeat(2, 1), -1)
    kept = probs.clone()
    _cut_top_p_sorted(kept, torch.tensor([[0.5], [1.0]]))
    assert torch.equal(kept[1], probs[1]) and 0 < int((kept[0] > 0).sum()) < len(LOGITS)


def test_greedy_is_the_largest_logit() -> None:
    """Temperature 0 takes the argmax."""
    assert picked(LOGITS[None].clone(), [row(SamplingParams(temperature=0))]) == [int(LOGITS.argmax())]


@pytest.mark.parametrize("size", [1, 255, 511, 512, 513, 1000, 4096, 50_257])
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_the_first_of_the_largest(size: int, num_rows: int) -> None:
    """What torch's `argmax` finds, wherever it stands, of equal ones the first; a NaN is larger than all."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.randint(-3, 4, (num_rows, size), generator=generator).float()  # the largest is there many times
    fine = torch.randn(num_rows, size, generator=generator)
    nothing = torch.full((num_rows, size), -torch.inf)
    late = fine.index_fill(1, torch.tensor([size - 1]), 9.0)
    broken = fine.index_fill(1, torch.tensor([size // 2, size - 1]), torch.nan)
    for logits in (coarse, fine, nothing, late, broken, late.bfloat16(), fine.t().contiguous().t()):
        assert torch.equal(first_largest(logits), logits.argmax(-1))


def test_penalties_and_bias_move_single_logits() -> None:
    """OpenAI's formula: logit - presence - frequency * count + bias, over the generated tokens."""
    best, second = LOGITS.topk(2).indices.tolist()
    gap = float(LOGITS[best] - LOGITS[second])
    base = SamplingParams(temperature=0)
    for params, outputs in (
        (replace(base, presence_penalty=min(2.0, gap + 0.01)), (best,)),
        (replace(base, frequency_penalty=(gap + 0.01) / 3), (best, best, best)),
        (replace(base, logit_bias={best: -gap - 0.01}), ()),
    ):
        assert picked(LOGITS[None].clone(), [row(params, outputs)]) == [second]
    assert picked(LOGITS[None].clone(), [row(replace(base, presence_penalty=1.0))]) == [best]


def test_min_tokens_forbids_the_end() -> None:
    """Before min_tokens neither EOS nor a stop token can be drawn."""
    logits = torch.zeros(1, 8)
    logits[0, 0], logits[0, 3], logits[0, 5] = 9, 8, 7
    params = SamplingParams(temperature=0, min_tokens=2, max_tokens=4, stop_token_ids=(3,))
    assert picked(logits.clone(), [row(params)]) == [5]
    assert picked(logits.clone(), [row(params, (5, 5))]) == [0]


def test_uniform_numbers_are_spread_and_fixed() -> None:
    """The stream of a seed is the same in every process and looks uniform."""
    assert uniform(7, 0) == uniform(7, 0) != uniform(7, 1)
    values = [uniform(seed, 3) for seed in range(4000)]
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    assert min(values) >= 0 and max(values) < 1


def test_the_largest_uniform_number_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash of all ones draws the last token that has a probability, not one behind it."""

    class Ones:
        def digest(self) -> bytes:
            return b"\xff" * 8

    monkeypatch.setattr("promptd.engine.sampler.hashlib.blake2b", lambda *_, **__: Ones())
    assert uniform(0, 0) < 1.0
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    assert picked(logits, [row(SamplingParams(temperature=1.0))]) == [1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-6),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=100.0, top_p=1e-9, top_k=3),
    ],
)
def test_extreme_values_are_greedy(params: SamplingParams) -> None:
    """Every cut taken to its end leaves the most likely token."""
    found = picked(LOGITS.repeat(50, 1), [row(params, seed=seed) for seed in range(50)])
    assert set(found) == {int(LOGITS.argmax())}


def test_extreme_values_that_change_nothing() -> None:
    """top_k of the vocabulary and more, min_p 0 and top_p 1 are off."""
    plain = [row(SamplingParams(), seed=seed) for seed in range(50)]
    off = [row(SamplingParams(top_k=1 << 30, top_p=1.0, min_p=0.0), seed=seed) for seed in range(50)]
    assert picked(LOGITS.repeat(50, 1), plain) == picked(LOGITS.repeat(50, 1), off)


def test_a_bias_of_minus_100_bans() -> None:
    """OpenAI's ban: no draw meets the token, though it was the likeliest."""
    best = int(LOGITS.argmax())
    params = SamplingParams(logit_bias={best: -100})
    assert best not in picked(LOGITS.repeat(200, 1), [row(params, seed=seed) for seed in range(200)])


def test_min_tokens_without_any_end() -> None:
    """min_tokens with ignore_eos and no stop tokens forbids nothing."""
    params = SamplingParams(temperature=0, min_tokens=3, ignore_eos=True)
    assert picked(LOGITS[None].clone(), [row(params)]) == [int(LOGITS.argmax())]


def test_logprobs_name_token_and_alternatives() -> None:
    """Log-probabilities are those of the softmax, best first."""
    logprobs = torch.log_softmax(LOGITS, -1)[None]
    (found,) = top_logprobs(logprobs, [5], 3)
    assert found.logprob == pytest.approx(float(logprobs[0, 5]))
    assert [token for token, _ in found.top] == LOGITS.topk(3).indices.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_seed_gives_the_same_text_in_any_batch(tiny_models: dict[str, Path], temperature: float) -> None:
    """With a seed a row's tokens do not depend on what else is in the batch, nor on preemption."""
    folder = tiny_models["llama"]
    params = SamplingParams(max_tokens=12, temperature=temperature, top_p=0.95, seed=11, ignore_eos=True)

    def target() -> Case:
        return Case((library(folder)[2],), tuple(range(9, 30)), params, arrives=2)

    alone, mixed, crowded = target(), target(), target()
    others = [
        Case((prompt,), (5, 6, 7, 8), SamplingParams(max_tokens=20, ignore_eos=True), arrives=n % 4)
        for n, prompt in enumerate(library(folder))
    ]
    run(make_engine(folder), [alone])
    run(make_engine(folder), [*others, mixed])
    engine = make_engine(folder, num_blocks=24, block_size=4, max_num_batched_tokens=16)
    run(engine, [crowded, *[Case((), tuple(range(5, 30)), params, arrives=1) for _ in range(5)]])
    assert engine.stats().preemptions > 0
    assert alone.tokens == mixed.tokens == crowded.tokens


def test_different_seeds_differ(tiny_models: dict[str, Path]) -> None:
    """Control: without a seed, or with another, the same request gives other tokens."""
    folder = tiny_models["llama"]
    cases = [
        Case((), tuple(range(9, 30)), SamplingParams(max_tokens=16, seed=seed, ignore_eos=True))
        for seed in (1, 2, None, None)
    ]
    run(make_engine(folder), cases)
    assert len({tuple(case.tokens) for case in cases}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("min_tokens", 99),
        ("stop", ("a", "b", "c", "d", "e")),
        ("stop", ("",)),
        ("logit_bias", {3: 101.0}),
    ],
)
def test_bad_values_are_named(field: str, value: object) -> None:
    """A value out of bounds raises an error that names the field and shows the value."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
