"""Attention of texts that continue, on the CPU: each row attends its K/V spans in place, no padding, no gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from promptd.modeling.attention import Site, flash_cpu, merge_parts
from promptd.modeling.decode_kernel import DecodeKernel, RowPlan, kernel_over
from promptd.modeling.kv_pool import Span
from promptd.modeling.packed_batch import DecodeGroup, PackedBatch, PrefillRow


class Fresh(NamedTuple):
    """What a pass has computed for neighbouring tokens, each `[1, num_heads or num_kv_heads, num_tokens, head_dim]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def narrow(self, start: int, length: int) -> Fresh:
        """Return some of these tokens."""
        return Fresh(*(each.narrow(2, start, length) for each in self))


@dataclass(frozen=True, slots=True)
class Stored:
    """A layer's part of the pool, keys and values `[1, num_kv_heads, num_slots, head_dim]`, and its scores' scale."""

    keys: torch.Tensor
    values: torch.Tensor
    scale: float

    def span(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a span, in place."""
        return self.keys.narrow(2, *span), self.values.narrow(2, *span)

    def read(self, query: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend one span; return that and its log-sum-exps."""
        return flash_cpu(query, *self.span(span), scale=self.scale)


class PooledAttention:
    """Serving attention: writes the step's keys and values to the pool, then attends."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self._decodes: dict[int | None, Decode] = {}  # by sliding window; the same in all layers
        self._runs = _runs(batch.prefill_rows, shares_spans=batch.shares_spans)

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`; rows may read slots that this very call writes."""
        batch, window = self.batch, site.window
        batch.pool.write(site.layer, batch.slot_mapping, key, value)
        stored = Stored(*batch.pool.heads(site.layer), site.scale)
        fresh = Fresh(query, key, value)
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        if batch.decode_groups:
            if window not in self._decodes:
                self._decodes[window] = _decode(batch, window)
            self._decodes[window].attend(out, query, stored)
        for run in self._runs:
            start, length = run[0].start, sum(row.length for row in run)
            own = fresh.narrow(start, length)
            if window is None or all(_num_keys(row) <= window for row in run):
                attended = _prefill(run, own, stored)
            else:
                attended = torch.cat([_windowed(*row, stored, window) for row in _apart(run, own)], 2)
            out[:, start : start + length] = attended.transpose(1, 2)
        return out


class Decode(Protocol):
    """Attention of a step's single tokens."""

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
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

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens."""
        self._kernel.attend(out, query, stored.keys, stored.values, stored.scale, self.plan)


class TorchDecode:
    """Span by span, a span that adjacent rows share once for them; parts are merged by their log-sum-exp."""

    def __init__(self, groups: Sequence[DecodeGroup], *, shares_spans: bool) -> None:
        self._groups = [
            (group.tokens, [group.runs(part, shares_spans=shares_spans) for part in range(group.num_parts)])
            for group in groups
        ]

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens."""
        for tokens, parts in self._groups:
            rows = query[:, :, tokens]
            outs: list[torch.Tensor] = []
            sums: list[torch.Tensor] = []
            for counts, spans in parts:
                for own, span in zip(rows.split(counts, 2), spans, strict=True):
                    part, log_sum = stored.read(own, span)
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


def _apart(run: Sequence[PrefillRow], fresh: Fresh) -> Iterator[tuple[PrefillRow, Fresh]]:
    """Yield each row of a run with what is its own."""
    for row in run:
        yield row, fresh.narrow(row.start - run[0].start, row.length)


def _prefill(run: Sequence[PrefillRow], fresh: Fresh, stored: Stored) -> torch.Tensor:
    """Attend a run's tokens `[1, num_heads, num_tokens, head_dim]`; the span that its rows share is read once."""
    owns = [_own(*row, stored) for row in _apart(run, fresh)]
    if not run[0].context:
        return owns[0][0]
    out, log_sum = stored.read(fresh.query, run[0].context[0])
    outs, sums = [out, *(own for own, _ in owns)], [log_sum, *(own_sum for _, own_sum in owns)]
    return merge_parts(torch.cat(outs, 2), torch.cat(sums, 2), 2)


def _own(row: PrefillRow, fresh: Fresh, stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend a row's own keys and all of its spans but the first; return it and its log-sum-exps."""
    parts = [flash_cpu(*fresh, is_causal=True, scale=stored.scale)]
    parts += [stored.read(fresh.query, span) for span in row.context[1:]]
    if len(parts) == 1:
        return parts[0]
    outs, sums = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return merge_parts(outs, sums, len(parts)), sums.unflatten(2, (len(parts), -1)).logsumexp(2)


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


def _windowed(row: PrefillRow, fresh: Fresh, stored: Stored, window: int) -> torch.Tensor:
    """Attend with an explicit band mask: only runs with a row that is longer than the model's window come here."""
    spans = [stored.span(span) for span in row.context]
    keys = torch.cat([*(key for key, _ in spans), fresh.key], 2)
    values = torch.cat([*(value for _, value in spans), fresh.value], 2)
    return torch.nn.functional.scaled_dot_product_attention(
        fresh.query,
        keys,
        values,
        attn_mask=causal_mask(row.length, keys.shape[2] - row.length, window, keys.device),
        scale=stored.scale,
        enable_gqa=fresh.query.shape[1] != keys.shape[1],
    )


def causal_mask(num_tokens: int, num_context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return `[num_tokens, num_context + num_tokens]`: True where a token sees a key."""
    at = torch.arange(num_context, num_context + num_tokens, device=device).unsqueeze(1)
    seen = torch.arange(num_context + num_tokens, device=device).unsqueeze(0)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)
