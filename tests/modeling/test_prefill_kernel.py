"""The compiled attention of texts against plain products in float64, its bits, and who is served by torch's."""

from __future__ import annotations

import math

import pytest
import torch

from promptd.modeling import prefill_kernel as module
from promptd.modeling.attention import flash_cpu
from promptd.modeling.prefill_kernel import Attended, PrefillKernel, attend_text, prefill_kernel

pytestmark = pytest.mark.usefixtures("compiler")
SCALE = 0.15


def kernel() -> PrefillKernel:
    """The kernel, which must be there where a compiler is."""
    found = prefill_kernel()
    assert found is not None
    return found


def make(num_heads: int, num_kv_heads: int, num_queries: int, num_keys: int, dim: int) -> list[torch.Tensor]:
    """Queries as a model's fused product leaves them (strided), and keys and values inside a larger pool."""
    generator = torch.Generator().manual_seed(num_queries)
    query = torch.randn(1, num_queries, num_heads + 3, dim, generator=generator)[:, :, 1 : num_heads + 1]
    pool = torch.randn(2, 1, num_kv_heads, num_keys + 9, dim, generator=generator)
    return [query.transpose(1, 2), *pool[:, :, :, 5 : 5 + num_keys]]


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, is_causal: bool) -> Attended:
    """The answer in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * SCALE
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(2, 2, 64), (6, 2, 64), (3, 1, 128), (2, 1, 256)])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (5, 63), (8, 64), (95, 65), (96, 128), (97, 1), (192, 64), (200, 333)]
)
def test_it_equals_plain_products(
    num_heads: int, num_kv_heads: int, dim: int, num_queries: int, num_keys: int, num_threads: int
) -> None:
    """Fewer and more tokens and keys than a block, a chunk, a tile hold; other keys, and the tokens' own."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for is_causal in (False, True):
            given = make(num_heads, num_kv_heads, num_queries, num_queries if is_causal else num_keys, dim)
            found = kernel().attend(*given, scale=SCALE, is_causal=is_causal)
            for mine, want in zip(found, expected(*given, is_causal=is_causal), strict=True):
                torch.testing.assert_close(mine.double(), want, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_scores_far_apart() -> None:
    """What was summed shrinks to the new scale, and nothing overflows."""
    query, keys, values = make(2, 2, 40, 300, 64)
    keys *= torch.linspace(0, 60, 300)[:, None]
    found, log_sums = kernel().attend(query, keys, values, scale=SCALE, is_causal=False)
    want, want_sums = expected(query, keys, values, is_causal=False)
    torch.testing.assert_close(found.double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_sums.double(), want_sums, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_bits_depend_on_no_other_token(is_causal: bool) -> None:
    """Tokens get the bits that they get in a shorter text, whatever follows them, and over keys that lie elsewhere."""
    query, keys, values = make(4, 2, 210, 210, 64)
    whole = kernel().attend(query, keys, values, scale=SCALE, is_causal=is_causal)
    for count in (1, 5, 96, 150, 192, 193):
        seen = count if is_causal else 210
        part = kernel().attend(
            query[:, :, :count], keys[:, :, :seen].clone(), values[:, :, :seen], scale=SCALE, is_causal=is_causal
        )
        for mine, all_of_them in zip(part, whole, strict=True):
            assert torch.equal(mine, all_of_them[:, :, :count])
    if not is_causal:
        last = kernel().attend(query[:, :, 99:], keys, values, scale=SCALE, is_causal=False)
        assert torch.equal(last[0], whole[0][:, :, 99:])


def test_what_is_not_a_number_stays_so_and_with_those_who_see_it() -> None:
    """A fault in a token's key shows in the tokens from it on, in the heads that read it, and in no other."""
    query, keys, values = make(4, 2, 150, 150, 64)
    clean, _ = kernel().attend(query, keys, values, scale=SCALE, is_causal=True)
    keys[0, 1, 100] = math.nan
    found, _ = kernel().attend(query, keys, values, scale=SCALE, is_causal=True)
    assert not found[:, 2:, 100:].isfinite().any()
    assert torch.equal(found[:, :2], clean[:, :2])
    assert torch.equal(found[:, 2:, :100], clean[:, 2:, :100])


def test_who_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sizes, other dtypes, few tokens, and everybody where there is no kernel; the control is who is not."""
    calls: list[torch.dtype] = []

    def noted(query: torch.Tensor, *args: object, **kwargs: object) -> Attended:
        calls.append(query.dtype)
        return flash_cpu(query, *args, **kwargs)

    monkeypatch.setattr(module, "flash_cpu", noted)
    given = make(2, 2, 20, 30, 64)
    attend_text(*given, scale=SCALE)
    assert not calls
    for others in ([each.bfloat16() for each in given], [each[..., :40] for each in given]):
        attend_text(*others, scale=SCALE)
    attend_text(given[0][:, :, :3], *given[1:], scale=SCALE)
    monkeypatch.setattr(module, "prefill_kernel", lambda: None)
    attend_text(*given, scale=SCALE)
    assert calls == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
