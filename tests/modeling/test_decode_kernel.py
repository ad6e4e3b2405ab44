"""The compiled decode attention against plain products in float64, and its bits."""

from __future__ import annotations

import math

import pytest
import torch

from promptd.modeling.decode_kernel import DecodeKernel, RowPlan, decode_kernel
from promptd.modeling.shared_spans import Span

Run = list[tuple[int, list[Span]]]
NUM_SLOTS = 700

pytestmark = pytest.mark.usefixtures("compiler")


def kernel_for(dtype: torch.dtype = torch.float32) -> DecodeKernel:
    """The kernel, which must be there where a compiler is."""
    kernel = decode_kernel(dtype)
    assert kernel is not None
    return kernel


def make(
    num_heads: int, num_kv_heads: int, dim: int, num_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries as a model's fused product leaves them (strided), keys and values."""
    generator = torch.Generator().manual_seed(dim)
    fused = torch.randn(1, num_tokens, num_heads + 3, dim, generator=generator)
    keys, values = (torch.randn(1, num_kv_heads, NUM_SLOTS, dim, generator=generator).to(dtype) for _ in range(2))
    return fused.to(dtype)[:, :, :num_heads].transpose(1, 2), keys, values


def attend(
    runs: list[Run],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float = 0.2,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's answer, `[num_tokens, num_heads, dim]`; NaN where no row of a run is."""
    out = torch.full((1, query.shape[2], query.shape[1], query.shape[3]), math.nan, dtype=query.dtype)
    kernel_for(query.dtype).attend(out, query, keys, values, scale, RowPlan(runs), bias)
    return out[0]


def expected(
    spans: list[Span],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float = 0.2,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token's answer in float64: query `[num_heads, dim]`."""
    slots = torch.cat([torch.arange(start, start + length) for start, length in spans])
    group = query.shape[0] // keys.shape[1]
    key, value = (stored[0, :, slots].repeat_interleave(group, 0).double() for stored in (keys, values))
    scores = (query.double().unsqueeze(1) @ key.transpose(1, 2)) * scale
    if bias is not None:
        distances = torch.arange(len(slots) - 1, -1, -1).clamp(max=bias.shape[1] - 1)
        scores += bias.double().flip(1)[:, distances].unsqueeze(1)
    return (scores.softmax(-1) @ value).squeeze(1)


RUNS: list[Run] = [
    [(4, [(10, 150), (300, 1)]), (0, [(10, 150)]), (2, [(10, 150), (301, 63), (420, 200)])],
    [(1, [(0, 1)])],
    [(5, [(500, 64), (600, 64)]), (6, [(500, 64)])],
    [(8, [(30, 40), (200, 50), (90, 60), (10, 3)]), (9, [(30, 40), (200, 50), (90, 61)]), (11, [(30, 40), (200, 60)])],
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim"), [(4, 4, 64), (6, 2, 20), (8, 1, 128), (2, 2, 256), (3, 3, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_plain_products(num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Ragged spans, shared ones, heads in groups, odd sizes, both dtypes."""
    query, keys, values = make(num_heads, num_kv_heads, dim, 12, dtype)
    found = attend(RUNS, query, keys, values)
    tolerance = 2e-6 if dtype is torch.float32 else 4e-3  # half a unit of bfloat16's last place, at 1
    for token, spans in (row for run in RUNS for row in run):
        want = expected(spans, query[0, :, token], keys, values)
        torch.testing.assert_close(found[token].double(), want, atol=tolerance, rtol=tolerance)
    assert found[[3, 7, 10]].isnan().all()  # tokens of others are not touched


@pytest.mark.parametrize("reach", [0, 3, 128, 2000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(4, 4, 64), (6, 2, 20)])
def test_scores_get_the_bias_of_their_distance(num_heads: int, num_kv_heads: int, dim: int, reach: int) -> None:
    """Keys near and farther than the table reaches, in shared spans and own ones; the control is no bias."""
    query, keys, values = make(num_heads, num_kv_heads, dim, 12)
    bias = 2 * torch.randn(num_heads, reach + 1, generator=torch.Generator().manual_seed(reach))
    found, without = attend(RUNS, query, keys, values, bias=bias), attend(RUNS, query, keys, values)
    for token, spans in (row for run in RUNS for row in run):
        want = expected(spans, query[0, :, token], keys, values, bias=bias)
        torch.testing.assert_close(found[token].double(), want, atol=4e-6, rtol=4e-6)
        is_same = reach == 0 or sum(length for _, length in spans) == 1  # one bias for all keys changes nothing
        assert torch.allclose(found[token], without[token], atol=1e-4) == is_same


def test_large_scores_and_lone_keys() -> None:
    """Scores far apart: the sums so far shrink to the new scale, and nothing overflows."""
    query, keys, values = make(2, 2, 64, 1)
    keys[:, :, :300] *= torch.linspace(0, 40, 300)[:, None]
    found = attend([[(0, [(0, 300)])]], query, keys, values, scale=1.0)
    torch.testing.assert_close(
        found[0].double(), expected([(0, 300)], query[0, :, 0], keys, values, 1.0), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 4 * 41).view(4, 41)], ids=["plain", "bias"])
def test_bits_depend_on_nobody_else(bias: torch.Tensor | None) -> None:
    """A row gets the same bits alone, in a run with others, and with its keys cut into other spans."""
    query, keys, values = make(4, 2, 64, 12)
    together = attend(RUNS, query, keys, values, bias=bias)
    for token, spans in (row for run in RUNS for row in run):
        alone = attend([[(token, spans)]], query, keys, values, bias=bias)
        assert torch.equal(alone[token], together[token])
        cut = [
            part
            for start, length in spans
            for part in ((start, length // 3), (start + length // 3, length - length // 3))
            if part[1]
        ]
        assert torch.equal(attend([[(token, cut)]], query, keys, values, bias=bias)[token], together[token])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_not_a_number_stays_so_and_alone(bad: float, where: str) -> None:
    """A fault in one row's keys or values shows in that row, in all heads that read it, and in no other."""
    query, keys, values = make(4, 2, 64, 12)
    clean = attend(RUNS, query, keys, values)
    (keys if where == "keys" else values)[0, 1, 430] = bad  # of row 2 alone
    found = attend(RUNS, query, keys, values)
    assert not found[2, 2:].isfinite().any()
    assert torch.equal(found[2, :2], clean[2, :2])
    others = [4, 0, 1, 5, 6, 8, 9, 11]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_tokens_are_stored_at_their_slots(num_tokens: int) -> None:
    """Strided tokens go where torch's `index_copy_` puts them, and nothing else changes."""
    tokens = torch.randn(num_tokens, 9, 20)[:, 2:5].transpose(0, 1)  # [3, num_tokens, 20]
    slots = torch.randperm(NUM_SLOTS)[:num_tokens]
    into, expected = torch.zeros(3, NUM_SLOTS, 20), torch.zeros(3, NUM_SLOTS, 20)
    kernel_for().store(into, slots, tokens)
    assert torch.equal(into, expected.index_copy_(1, slots, tokens))


@pytest.mark.parametrize("slot", [-1, NUM_SLOTS])
def test_what_is_outside_the_pool_is_an_error(slot: int) -> None:
    """A slot or a span that the pool does not have is an `IndexError`, and nothing is written."""
    query, keys, values = make(4, 2, 64, 12)
    before = keys.clone()
    with pytest.raises(IndexError):
        kernel_for().store(keys[0], torch.tensor([3, slot]), torch.zeros(2, 2, 64))
    assert torch.equal(keys, before)
    for span in ((slot, 1), (0, NUM_SLOTS + 1), (5, 0)):
        with pytest.raises(IndexError):
            attend([[(0, [(0, 3), span])]], query, keys, values)
