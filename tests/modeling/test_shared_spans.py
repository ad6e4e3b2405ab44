"""A span that adjacent rows read is read once for all of them, with the same numbers: by the kernel, and by torch's
attention where there is none, but there never where bits must hold."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from promptd.modeling import attention_pooled
from promptd.modeling.attention import Site
from promptd.modeling.attention_pooled import PooledAttention
from promptd.modeling.decode_kernel import decode_kernel
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import DecodeRow, PackedBatch, PackedRow
from promptd.modeling.shared_spans import Run, Span, behind_keys, first_keys, num_common, pieces_of, runs_of

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
    """Six rows of three prompts: three products with prompts instead of six, and one with each row's own text; apart
    each row has one product with all of its keys."""
    monkeypatch.setattr(attention_pooled, "kernel_over", lambda keys: None)
    reads: list[int] = []
    flash = attention_pooled.attend_text

    def counted(query: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        reads.append(query.shape[2])
        return flash(query, *args, **kwargs)

    monkeypatch.setattr(attention_pooled, "attend_text", counted)
    attend(batch_of(6, shares_spans=True))
    assert sorted(reads) == [1] * 6 + [2] * 3
    reads.clear()
    attend(batch_of(6, shares_spans=False))
    assert reads == [1] * 6


def test_the_kernel_is_told_of_shared_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows of three prompts are three runs; many rows of one are one, or as many as every thread needs."""
    batch = batch_of(6, shares_spans=True)
    kernel = decode_kernel(torch.float32)
    if kernel is None:
        pytest.skip("no C compiler on this machine: ./tests/run could not install it")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert attention_pooled.KernelDecode(batch.decode_rows, kernel, KV_HEADS).plan.struct.num_runs == 3
    rows = [DecodeRow(row.token, [(0, 20), (100 + row.token, 1)]) for row in batch.decode_rows]
    for num_threads, expected in ((1, (1, 6)), (2, (2, 3)), (64, (6, 1))):
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)  # noqa: B023 - it is called at once
        struct = attention_pooled.KernelDecode(rows, kernel, KV_HEADS).plan.struct
        assert (struct.num_runs, struct.max_rows) == expected


@pytest.mark.usefixtures("has_kernel")
def test_a_row_beside_one_that_continues_it() -> None:
    """A text's last token and its candidates run at once: all that the first reads, the others read, too."""
    pool = batch_of(1, shares_spans=True).pool
    rows = [PackedRow([1], 0, [120], (), [0])]
    rows += [PackedRow([2 + more], 1, [140 + more], [(120, 1)], [0]) for more in range(3)]
    rows += [PackedRow([5], 40, [200], [(0, 40)], [0]), PackedRow([6], 41, [201], [(0, 40), (200, 1)], [0])]
    together, apart = (attend(PackedBatch(rows, pool, shares_spans=one)) for one in (True, False))
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)


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
    flash = attention_pooled.attend_text

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> Any:
        reads.append((query.shape[2], key.shape[2]))
        return flash(query, key, *args, **kwargs)

    together = attend(reading_batch(shares_spans=True), window)
    monkeypatch.setattr(attention_pooled, "attend_text", counted)
    apart = attend(reading_batch(shares_spans=False), window)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    if window is None:
        assert [num_queries for num_queries, num_keys in reads if num_keys >= 20] == [3, 2, 5, 4, 2]
        reads.clear()
        attend(reading_batch(shares_spans=True))
        assert [num_queries for num_queries, num_keys in reads if num_keys >= 20] == [10, 4, 2]


SCATTERED = [(64, 16), (0, 32), (96, 8), (200, 16)]
"""One text in blocks that lie wherever there was room."""


@pytest.mark.parametrize("length", [1, 3])
def test_a_scattered_text_is_read_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind one text read all of its blocks at once, also one whose own tokens lie right behind them, and get
    what each gets alone; the control is reading them apart."""
    behind = [SCATTERED, [*SCATTERED[:-1], (200, 20)], SCATTERED]
    first = batch_of(1, shares_spans=True)
    rows = [
        PackedRow([1] * length, 80, list(range(220 + 4 * row, 220 + 4 * row + length)), context)
        for row, context in enumerate(behind)
    ]
    reads: list[tuple[int, int]] = []
    flash = attention_pooled.attend_text

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> Any:
        reads.append((query.shape[2], key.shape[2]))
        return flash(query, key, *args, **kwargs)

    by_kernel = attend(PackedBatch(rows, first.pool, shares_spans=True))
    monkeypatch.setattr(attention_pooled, "kernel_over", lambda keys: None)
    monkeypatch.setattr(attention_pooled, "attend_text", counted)
    apart = attend(PackedBatch(rows, first.pool, shares_spans=False))
    assert not [1 for num_queries, _ in reads if num_queries > length]
    together = attend(PackedBatch(rows, first.pool, shares_spans=True))
    assert (3 * length, 72) in reads
    for found in (by_kernel, together):
        torch.testing.assert_close(found, apart, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("has_kernel")
@pytest.mark.parametrize("length", [1, 3])
def test_where_keys_lie_changes_no_bit(length: int) -> None:
    """A row whose bits must hold gets the same ones from keys side by side and from the same keys in pieces."""
    pool, together = batch_of(1, shares_spans=False).pool, [(0, 72)]
    answers = []
    for context in (together, SCATTERED):
        for stored in (pool.keys, pool.values):
            keys = torch.randn(KV_HEADS, 72, DIM, generator=torch.Generator().manual_seed(7))
            stored[0][:, slots_of(context)] = keys
        row = PackedRow([1] * length, 80, list(range(220, 220 + length)), context)
        answers.append(attend(PackedBatch([row], pool, shares_spans=False)))
    assert torch.equal(*answers)


def num_read(rows: list[list[Span]], runs: list[Run]) -> int:
    """Keys that are read where what a run shares is read once."""
    saved = sum((run.num_rows - 1) * run.num_shared for run in runs)
    return sum(length for row in rows for _, length in row) - saved


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_all_rows_and_share_what_is_the_same(seed: int) -> None:
    """Of random rows in order: each is in one run, all rows of a run begin with the keys it shares, and no fewer keys
    are read where every row stands alone."""
    rng = random.Random(seed)
    rows: list[list[Span]] = []
    for _ in range(40):
        begun = rng.choice(rows)[: rng.randint(0, 3)] if rows and rng.random() < 0.8 else []
        rows.append([*begun, *((rng.randrange(1000), rng.randint(1, 50)) for _ in range(rng.randint(1, 3)))])
    rows.sort()
    runs = runs_of(rows)
    assert [at for run in runs for at in range(run.first, run.first + run.num_rows)] == list(range(len(rows)))
    for run in runs:
        first, *others = rows[run.first : run.first + run.num_rows]
        assert bool(others) == bool(run.num_shared)
        shared = first_keys(first, run.num_shared)
        assert all(slots_of(first_keys(other, run.num_shared)) == slots_of(shared) for other in others)
        assert slots_of(shared) + slots_of(behind_keys(first, run.num_shared)) == slots_of(first)
        if others:
            assert run.num_shared == min(num_common(first, other) for other in others)
    assert num_read(rows, runs) < num_read(rows, [Run(at) for at in range(len(rows))])


def slots_of(spans: list[Span]) -> list[int]:
    """Every slot, in order."""
    return [slot for start, length in spans for slot in range(start, start + length)]


def test_a_row_goes_where_it_saves_most() -> None:
    """Pairs with more in common do not part the many that share a prompt; two of one long text leave a short prompt."""
    prompt, text = (0, 32), (100, 900)
    pairs: list[list[Span]] = [[prompt, (2000 + 100 * (row // 2), 4), (3000 + row, 1)] for row in range(8)]
    assert runs_of(pairs) == [Run(0, 8, 32)]
    alone: list[Span] = [prompt, (40, 1)]
    behind: list[list[Span]] = [[prompt, text, (5000 + row, 1)] for row in range(3)]
    assert runs_of([alone, *behind]) == [Run(0), Run(1, 3, 932)]
    assert runs_of([alone, alone, [(7, 1)], *behind]) == [Run(0, 2, 33), Run(2), Run(3, 3, 932)]
    assert runs_of([]) == []


def test_long_spans_are_not_copied() -> None:
    """Short neighbours are read together, a long span where it lies; where bits must hold everything is one piece."""
    assert pieces_of([(0, 20), (32, 16), (100, 5000), (9000, 16), (9100, 7)]) == [
        [(0, 20), (32, 16)], [(100, 5000)], [(9000, 16), (9100, 7)],
    ]  # fmt: skip
    assert pieces_of([]) == []
