"""A span that adjacent rows read is read once for all of them, with the same numbers: by the kernel, and by torch's
attention where there is none, but there never where bits must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promptd.modeling import attention_pooled
from promptd.modeling.attention import Site
from promptd.modeling.attention_pooled import PooledAttention
from promptd.modeling.decode_kernel import decode_kernel
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow

HEADS, KV_HEADS, DIM = 4, 2, 8


def batch_of(num_rows: int, *, shares_spans: bool, num_others: int = 0) -> PackedBatch:
    """Decode rows of which each two follow the same prompt; then rows without one, and a row of several tokens."""
    pool = KVPool(
        num_layers=1,
        num_slots=300,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    for stored in (pool.keys, pool.values):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    rows = [
        PackedRow([1], 30, [100 + 10 * row + 5], [(30 * (row // 2), 20), (100 + 10 * row, 5)])
        for row in range(num_rows)
    ]
    rows += [PackedRow([1], 3, [250 + 4 * row + 3], [(250 + 4 * row, 3)]) for row in range(num_others)]
    if num_others:
        rows.append(PackedRow([1, 2, 3], 20, [290, 291, 292], [(0, 20)]))
    return PackedBatch(rows, pool, shares_spans=shares_spans)


def attend(batch: PackedBatch, window: int | None = None) -> torch.Tensor:
    """Attend with the same numbers, whatever the batch is."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, 32, DIM, generator=generator)[:, :, : batch.num_tokens]
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return PooledAttention(batch).attend(Site(0, DIM**-0.5, window), query, key, value)


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def has_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the compiled kernel, and without."""
    if not request.param:
        monkeypatch.setattr(attention_pooled, "kernel_over", lambda keys: None)
    elif decode_kernel(torch.float32) is None:
        pytest.skip("no C compiler on this machine: ./tests/run could not install it")
    return bool(request.param)


@pytest.mark.parametrize("num_others", [0, 3])
def test_shared_equals_apart(has_kernel: bool, num_others: int) -> None:
    """Rows of one prompt, alone and beside others, give what each gives by itself."""
    shared, apart = (attend(batch_of(6, shares_spans=one, num_others=num_others)) for one in (True, False))
    torch.testing.assert_close(shared, apart, atol=1e-6, rtol=1e-5)


def test_both_ways_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and torch's attention agree; rows that were cut into other parts are in the batch, too."""
    with_kernel = attend(batch_of(6, shares_spans=True, num_others=3))
    monkeypatch.setattr(attention_pooled, "kernel_over", lambda keys: None)
    torch.testing.assert_close(with_kernel, attend(batch_of(6, shares_spans=True, num_others=3)), atol=1e-6, rtol=1e-5)


def test_a_span_is_read_once_for_the_rows_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows of three prompts: three products with prompts instead of six, and one with each row's own text."""
    monkeypatch.setattr(attention_pooled, "kernel_over", lambda keys: None)
    reads: list[int] = []
    flash = attention_pooled.flash_cpu

    def counted(query: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        reads.append(query.shape[2])
        return flash(query, *args, **kwargs)

    monkeypatch.setattr(attention_pooled, "flash_cpu", counted)
    attend(batch_of(6, shares_spans=True))
    assert reads == [2] * 3 + [1] * 6
    reads.clear()
    attend(batch_of(6, shares_spans=False))
    assert reads == [1] * 12


def test_the_kernel_is_told_of_shared_spans() -> None:
    """Six rows of three prompts are three runs; many rows of one are cut, so that more than one thread has work."""
    batch = batch_of(6, shares_spans=True)
    kernel = decode_kernel(torch.float32)
    if kernel is None:
        pytest.skip("no C compiler on this machine: ./tests/run could not install it")
    groups = list(batch.decode_groups.values())
    assert attention_pooled.KernelDecode(groups, kernel).plan.struct.num_runs == 3
    groups[0].spans = [[(0, 20), (100 + row, 1)] for row in range(6)]
    plan = attention_pooled.KernelDecode(groups, kernel).plan
    assert (plan.struct.num_runs, plan.struct.max_rows) == (1, 6)


def reading_batch(*, shares_spans: bool) -> PackedBatch:
    """Texts of several tokens: four behind one prompt, one of them a chain's; one behind another; one behind none."""
    batch = batch_of(1, shares_spans=shares_spans)
    behind = [[(0, 20)], [(0, 20), (40, 7)], [(0, 20)], [(30, 20)], [], [(0, 20)]]
    lengths, rows = [3, 2, 5, 4, 3, 2], list(batch.rows)
    for number, (context, length) in enumerate(zip(behind, lengths, strict=True)):
        slots = range(150 + 10 * number, 150 + 10 * number + length)
        rows.append(PackedRow([1] * length, 20, list(slots), context))
    return PackedBatch(rows, batch.pool, shares_spans=shares_spans)


@pytest.mark.parametrize("window", [None, 22])
def test_texts_behind_one_prompt_read_it_at_once(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what it gets by itself, and the prompt's keys are read once for neighbours; a window keeps its band."""
    reads: list[tuple[int, int]] = []
    flash = attention_pooled.flash_cpu

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> Any:
        reads.append((query.shape[2], key.shape[2]))
        return flash(query, key, *args, **kwargs)

    together = attend(reading_batch(shares_spans=True), window)
    monkeypatch.setattr(attention_pooled, "flash_cpu", counted)
    apart = attend(reading_batch(shares_spans=False), window)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    if window is None:
        assert [num_queries for num_queries, num_keys in reads if num_keys == 20][-5:] == [3, 2, 5, 4, 2]
        reads.clear()
        attend(reading_batch(shares_spans=True))
        assert [num_queries for num_queries, num_keys in reads if num_keys == 20][-3:] == [10, 4, 2]
