"""Attention of texts that continue, on the CPU: each row attends its K/V spans in place, no padding, no gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from promptd.modeling.attention import Site, flash_cpu, merge_parts
from promptd.modeling.decode_kernel import DecodeKernel, RowPlan, kernel_over
from promptd.modeling.kv_pool import Span
from promptd.modeling.packed_batch import DecodeGroup, PackedBatch, PrefillRow


class PooledAttention:
    """Serving attention: writes the step's keys and values to the pool, then attends."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self._decodes: dict[int | None, Decode] = {}  # by sliding window; the same in all layers
        self._runs = _runs(batch.prefill_rows, shares_spans=batch.shares_spans)

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`; rows may read slots that this very call writes."""
        batch, scale, window = self.batch, site.scale, site.window
        batch.pool.write(site.layer, batch.slot_mapping, key, value)
        keys, values = batch.pool.heads(site.layer)
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        if batch.decode_groups:
            if window not in self._decodes:
                self._decodes[window] = _decode(batch, window)
            self._decodes[window].attend(out, query, keys, values, scale)
        for run in self._runs:
            tokens = slice(run[0].start, run[-1].start + run[-1].length)
            own_query, own_key, own_value = (each[:, :, tokens] for each in (query, key, value))
            if window is None or all(_num_keys(row) <= window for row in run):
                attended = _prefill(run, own_query, own_key, own_value, keys, values, scale)
            else:
                rows = _apart(run, own_query, own_key, own_value)
                attended = torch.cat([_windowed(*row, keys, values, scale, window) for row in rows], 2)
            out[:, tokens] = attended.transpose(1, 2)
        return out


class Decode(Protocol):
    """Attention of a step's single tokens."""

    def attend(
        self, out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        """Fill these tokens of `out` `[1, num_tokens, num_heads, head_dim]`; see `DecodeKernel.attend`."""


def _decode(batch: PackedBatch, window: int | None) -> Decode:
    groups = list(batch.decode_groups.values())
    groups = groups if window is None else _clipped(groups, window)
    kernel = kernel_over(batch.pool.keys)
    if kernel is None:
        return TorchDecode(groups, shares_spans=batch.shares_spans)
    return KernelDecode(groups, kernel)


class KernelDecode:
    """All rows in one call of the kernel."""

    def __init__(self, groups: Sequence[DecodeGroup], kernel: DecodeKernel) -> None:
        self._kernel = kernel
        self.plan = RowPlan.of(row for group in groups for row in group.rows())

    def attend(
        self, out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        """Fill these tokens."""
        self._kernel.attend(out, query, keys, values, scale, self.plan)


class TorchDecode:
    """Span by span, a span that adjacent rows share once for them; parts are merged by their log-sum-exp."""

    def __init__(self, groups: Sequence[DecodeGroup], *, shares_spans: bool) -> None:
        self._groups = [
            (group.tokens, [group.runs(part, shares_spans=shares_spans) for part in range(group.num_parts)])
            for group in groups
        ]

    def attend(
        self, out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        """Fill these tokens."""
        for tokens, parts in self._groups:
            rows = query[:, :, tokens]
            outs: list[torch.Tensor] = []
            sums: list[torch.Tensor] = []
            for counts, spans in parts:
                for own, (start, length) in zip(rows.split(counts, 2), spans, strict=True):
                    key, value = (stored.narrow(2, start, length) for stored in (keys, values))
                    part, log_sum = flash_cpu(own, key, value, scale=scale)
                    outs.append(part)
                    sums.append(log_sum)
            merged = torch.cat(outs, 2)
            if len(parts) > 1:
                merged = merge_parts(merged, torch.cat(sums, 2), len(parts))
            out[:, tokens] = merged.transpose(1, 2)


def _runs(rows: Sequence[PrefillRow], *, shares_spans: bool) -> list[list[PrefillRow]]:
    """Put adjacent rows together that begin with the same span."""
    runs: list[list[PrefillRow]] = []
    for row in rows:
        last = runs[-1][-1] if runs else None
        is_next = shares_spans and last is not None and last.start + last.length == row.start
        if is_next and last is not None and row.context and row.context[:1] == last.context[:1]:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _num_keys(row: PrefillRow) -> int:
    return row.length + sum(length for _, length in row.context)


def _apart(
    run: Sequence[PrefillRow], *parts: torch.Tensor
) -> Iterator[tuple[PrefillRow, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each row of a run with its own queries, keys and values."""
    for row in run:
        query, key, value = (part.narrow(2, row.start - run[0].start, row.length) for part in parts)
        yield row, query, key, value


def _prefill(
    run: Sequence[PrefillRow],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend a run's tokens `[1, num_heads, num_tokens, head_dim]`; the span that its rows share is read once."""
    owns = [_own(*row, keys, values, scale) for row in _apart(run, query, key, value)]
    if not run[0].context:
        return owns[0][0]
    out, log_sum = _read(run[0].context[0], query, keys, values, scale)
    outs, sums = [out, *(own for own, _ in owns)], [log_sum, *(own_sum for _, own_sum in owns)]
    return merge_parts(torch.cat(outs, 2), torch.cat(sums, 2), 2)


def _own(
    row: PrefillRow,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend a row's own keys and all of its spans but the first; return it and its log-sum-exps."""
    parts = [flash_cpu(query, key, value, is_causal=True, scale=scale)]
    parts += [_read(span, query, keys, values, scale) for span in row.context[1:]]
    if len(parts) == 1:
        return parts[0]
    outs, sums = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return merge_parts(outs, sums, len(parts)), sums.unflatten(2, (len(parts), -1)).logsumexp(2)


def _read(
    span: Span, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one span of the pool."""
    return flash_cpu(query, *(stored.narrow(2, *span) for stored in (keys, values)), scale=scale)


def _clipped(groups: list[DecodeGroup], window: int) -> list[DecodeGroup]:
    """Regroup decode rows after dropping the keys that lie further back than the model's sliding window."""
    clipped: dict[int, DecodeGroup] = {}
    rows = [row for group in groups for row in group.rows()]
    for token, spans in sorted(rows):  # groups may join here: a group's tokens stay in the order of the batch
        left, kept = window, []
        for start, length in reversed(spans):
            take = min(length, left)
            if take:
                kept.append((start + length - take, take))
                left -= take
        target = clipped.setdefault(len(kept), DecodeGroup(len(kept)))
        target.tokens.append(token)
        target.spans.append(kept[::-1])
    return list(clipped.values())


def _windowed(
    row: PrefillRow,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Attend with an explicit band mask: only runs with a row that is longer than the model's window come here."""
    spans = [(keys.narrow(2, s, n), values.narrow(2, s, n)) for s, n in row.context]
    all_keys = torch.cat([*(k for k, _ in spans), key], 2)
    all_values = torch.cat([*(v for _, v in spans), value], 2)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        all_keys,
        all_values,
        attn_mask=causal_mask(row.length, all_keys.shape[2] - row.length, window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def causal_mask(num_tokens: int, num_context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return `[num_tokens, num_context + num_tokens]`: True where a token sees a key."""
    at = torch.arange(num_context, num_context + num_tokens, device=device).unsqueeze(1)
    seen = torch.arange(num_context + num_tokens, device=device).unsqueeze(0)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)
