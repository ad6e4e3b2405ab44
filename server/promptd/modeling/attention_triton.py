"""CUDA attention: one Triton kernel over the same K/V spans, for prefill and decode alike.

A program answers `BLOCK_M` (query, head of the group) pairs of one row and one K/V head over one fixed range of
`SPLIT_KEYS` keys; ranges are cut by key number alone, so a row's rounding does not depend on its neighbours. Partial
results are merged by their log-sum-exp. Metadata goes to the device once a batch; `attend` never synchronises.
"""

# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from promptd.modeling.attention import Site
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow
from promptd.modeling.shared_spans import Span
from promptd.modeling.transfer import to_device

SPLIT_KEYS = 1024
_BLOCK_KEYS = 32
_DECODE_BLOCK, _PREFILL_BLOCK = 16, 64


@triton.jit  # type: ignore[untyped-decorator]
def _span_attention(  # type: ignore[no-untyped-def]
    query, keys, values, out, log_sums,
    block_row, block_query, row_start, row_length, row_context, row_spans, span_start, span_length, span_offset,
    scale, window,
    stride_qh, stride_qt, stride_slot, stride_kv_head, stride_os, stride_ot, stride_oh, stride_ls, stride_lt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(block_row + block)
    first = tl.load(row_start + row)
    length = tl.load(row_length + row)
    context = tl.load(row_context + row)
    pair = tl.arange(0, BLOCK_M)
    at = tl.load(block_query + block) + pair // GROUP  # query number inside the row
    head = kv_head * GROUP + pair % GROUP
    is_query = (at < length) & (pair // GROUP < BLOCK_M // GROUP)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    place = query + head[:, None] * stride_qh + (first + at)[:, None] * stride_qt + dims[None, :]
    q = tl.load(place, mask=is_query[:, None] & is_dim[None, :], other=0.0)  # [BLOCK_M, PADDED_DIM]
    sees_to = context + at  # the last key that each query sees
    sees_from = tl.where(window > 0, sees_to - window + 1, 0)
    best = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    begin, end = split * SPLIT, (split + 1) * SPLIT
    for span in range(tl.load(row_spans + row), tl.load(row_spans + row + 1)):
        slot = tl.load(span_start + span)
        offset = tl.load(span_offset + span)
        low = tl.maximum(begin - offset, 0)
        high = tl.minimum(end - offset, tl.load(span_length + span))
        for start in range(low, high, BLOCK_N):
            inside = start + tl.arange(0, BLOCK_N)
            number = offset + inside  # key number inside the row
            is_key = inside < high
            address = (slot + inside)[:, None].to(tl.int64) * stride_slot + kv_head * stride_kv_head + dims[None, :]
            mask = is_key[:, None] & is_dim[None, :]
            k = tl.load(keys + address, mask=mask, other=0.0)  # [BLOCK_N, PADDED_DIM]
            v = tl.load(values + address, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
            seen = is_key[None, :] & (number[None, :] <= sees_to[:, None]) & (number[None, :] >= sees_from[:, None])
            scores = tl.where(seen, scores, -1e30)
            top = tl.maximum(best, tl.max(scores, 1))
            weights = tl.where(seen, tl.exp(scores - top[:, None]), 0.0)
            shrink = tl.exp(best - top)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    log_sum = tl.where(total > 0, best + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    target = out + split * stride_os + (first + at)[:, None] * stride_ot + head[:, None] * stride_oh + dims[None, :]
    tl.store(target, acc, mask=is_query[:, None] & is_dim[None, :])
    tl.store(log_sums + split * stride_ls + (first + at) * stride_lt + head, log_sum, mask=is_query)


@dataclass(frozen=True)
class _Launch:
    """Query blocks of one size: `[num_blocks]` int32 each, on the device."""

    block_m: int
    block_row: torch.Tensor
    block_query: torch.Tensor


@dataclass(frozen=True)
class SpanTable:
    """Which keys the rows of a batch see, as columns of numbers."""

    starts: list[int]
    """Each row's first token."""
    lengths: list[int]
    contexts: list[int]
    """Keys in front of each row's tokens."""
    row_spans: list[int]
    """Where each row's spans begin, and where the last one's end."""
    firsts: list[int]
    """The first slot of each span."""
    counts: list[int]
    offsets: list[int]
    """The number of each span's first key inside its row."""
    num_splits: int
    """Ranges of keys that the longest row has."""

    @classmethod
    def of(cls, batch: PackedBatch) -> SpanTable:
        """Read it off the batch."""
        spans: list[Span] = []
        row_spans: list[int] = [0]
        offsets: list[int] = []
        contexts: list[int] = []
        lengths: list[int] = []
        most = 0
        for row in batch.rows:
            at = 0
            for span in (*row.context, *_runs(row)):
                spans.append(span)
                offsets.append(at)
                at += span[1]
            row_spans.append(len(spans))
            lengths.append(len(row.slots))
            contexts.append(at - len(row.slots))
            most = max(most, at)
        firsts, counts = [start for start, _ in spans], [count for _, count in spans]
        return cls(batch.row_starts, lengths, contexts, row_spans, firsts, counts, offsets, -(-most // SPLIT_KEYS))

    @property
    def columns(self) -> list[list[int]]:
        """What the kernel reads, in its order."""
        return [
            self.starts, self.lengths, self.contexts, self.row_spans, self.firsts, self.counts, self.offsets,
        ]  # fmt: skip


class TritonAttention:
    """Serving attention on CUDA: rows of these lengths, whose tokens lie in these slots, over the spans of a table."""

    def __init__(
        self,
        pool: KVPool,
        slots: torch.Tensor,
        lengths: Sequence[int],
        columns: Sequence[torch.Tensor],
        num_splits: int,
    ) -> None:
        """`slots` `[num_tokens]` int64 and the table's `columns` (int32) lie on the device; both are read when a layer
        attends, so what stands in them may change from one pass to the next."""
        self._pool = pool
        self._slots = slots
        self._lengths = lengths
        self._columns = columns
        self._num_splits = num_splits
        self._launches: dict[int, list[_Launch]] = {}  # by heads in a group: known when the first layer attends

    @classmethod
    def of(cls, batch: PackedBatch) -> TritonAttention:
        """Make it for one batch."""
        table, device = SpanTable.of(batch), batch.pool.keys.device
        flat = to_device([value for column in table.columns for value in column], device)
        columns = flat.split([len(column) for column in table.columns])
        return cls(batch.pool, batch.slot_mapping, table.lengths, columns, table.num_splits)

    def _launches_for(self, group: int) -> list[_Launch]:
        """Cut the rows into query blocks: single tokens apart from longer rows, so that each size is fixed."""
        if group not in self._launches:
            launches = []
            for block_m, is_decode in ((_DECODE_BLOCK, True), (_PREFILL_BLOCK, False)):
                block_m = max(block_m, triton.next_power_of_2(group))
                rows = [n for n, length in enumerate(self._lengths) if (length == 1) is is_decode]
                blocks = [(row, at) for row in rows for at in range(0, self._lengths[row], block_m // group)]
                if blocks:
                    numbers = [row for row, _ in blocks] + [at for _, at in blocks]
                    flat = to_device(numbers, self._slots.device)
                    launches.append(_Launch(block_m, *flat.chunk(2)))
            self._launches[group] = launches
        return self._launches[group]

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`; fp32 accumulation, IEEE products for fp32."""
        self._pool.write(site.layer, self._slots, key, value)
        keys, values = self._pool.keys[site.layer], self._pool.values[site.layer]  # [num_kv_heads, num_slots, head_dim]
        _, num_heads, num_tokens, head_dim = query.shape
        if query.stride(-1) != 1:
            query = query.contiguous()
        group = num_heads // key.shape[1]
        out = torch.empty(self._num_splits, num_tokens, num_heads, head_dim, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(self._num_splits, num_tokens, num_heads, dtype=torch.float32, device=query.device)
        for launch in self._launches_for(group):
            _span_attention[(len(launch.block_row), key.shape[1], self._num_splits)](
                query, keys, values, out, log_sums,
                launch.block_row, launch.block_query, *self._columns,
                site.scale, site.window or 0,
                query.stride(1), query.stride(2), keys.stride(1), keys.stride(0),
                out.stride(0), out.stride(1), out.stride(2), log_sums.stride(0), log_sums.stride(1),
                GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
                BLOCK_M=launch.block_m, BLOCK_N=_BLOCK_KEYS, SPLIT=SPLIT_KEYS,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            )  # fmt: skip
        if self._num_splits == 1:
            return out.to(query.dtype)
        weights = torch.softmax(log_sums, 0).unsqueeze(-1)
        return (out * weights).sum(0, keepdim=True).to(query.dtype)


def _runs(row: PackedRow) -> list[Span]:
    """The row's own slots as runs of adjacent ones."""
    runs: list[Span] = []
    for slot in row.slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs
