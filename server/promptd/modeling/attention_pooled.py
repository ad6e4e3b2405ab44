"""Attention of texts that continue, on the CPU, without padding: single tokens read their keys where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from promptd.modeling.attention import Site, merge_parts
from promptd.modeling.decode_kernel import DecodeKernel, RowPlan, kernel_over
from promptd.modeling.packed_batch import DecodeRow, PackedBatch, PrefillRow
from promptd.modeling.prefill_kernel import attend_text
from promptd.modeling.shared_spans import Run, Span, behind_keys, first_keys, runs_of

Part = tuple[torch.Tensor, torch.Tensor]
"""What tokens have attended of some keys `[1, num_heads, num_tokens, head_dim]`, and its log-sum-exps."""


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

    def of(self, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of some spans: in place where it is one, else side by side.

        Copying them takes less than a product for each: those are small, and their outcomes are to be merged.
        """
        keys, values = ([stored.narrow(2, *span) for span in spans] for stored in (self.keys, self.values))
        return (keys[0], values[0]) if len(spans) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))

    def read(self, query: torch.Tensor, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend some spans; return that and its log-sum-exps."""
        return attend_text(query, *self.of(spans), scale=self.scale)


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
        if batch.decode_rows:
            if window not in self._decodes:
                self._decodes[window] = _decode(batch, window)
            self._decodes[window].attend(out, query, stored)
        for rows, num_shared in self._runs:
            start, length = rows[0].start, sum(row.length for row in rows)
            own = fresh.narrow(start, length)
            if window is None or all(_num_keys(row) <= window for row in rows):
                attended = _prefill(rows, num_shared, own, stored)
            else:
                attended = torch.cat([_windowed(*row, stored, window) for row in _apart(rows, own)], 2)
            out[:, start : start + length] = attended.transpose(1, 2)
        return out


class Decode(Protocol):
    """Attention of a step's single tokens."""

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens of `out` `[1, num_tokens, num_heads, head_dim]`; see `DecodeKernel.attend`."""


def _decode(batch: PackedBatch, window: int | None) -> Decode:
    rows = batch.decode_rows
    if window is not None:
        rows = [DecodeRow(row.token, _nearest(row.spans, window)) for row in rows]
    kernel = kernel_over(batch.pool.keys)
    return TorchDecode(rows, shares_spans=batch.shares_spans) if kernel is None else KernelDecode(rows, kernel)


def _nearest(spans: Sequence[Span], num_keys: int) -> list[Span]:
    """Drop the keys that lie further back than the model's sliding window."""
    return behind_keys(spans, max(0, sum(length for _, length in spans) - num_keys))


class KernelDecode:
    """All rows in one call of the kernel."""

    def __init__(self, rows: Sequence[DecodeRow], kernel: DecodeKernel) -> None:
        self._kernel = kernel
        self.plan = RowPlan.of((row.token, row.spans) for row in rows)

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens."""
        self._kernel.attend(out, query, stored.keys, stored.values, stored.scale, self.plan)


class TorchDecode:
    """Run by run: what its rows share, then what is each row's own; merged by their log-sum-exp."""

    def __init__(self, rows: Sequence[DecodeRow], *, shares_spans: bool) -> None:
        self._rows = rows
        self._runs = _runs_of([row.spans for row in rows], shares_spans=shares_spans)

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens."""
        for run in self._runs:
            rows = self._rows[run.first : run.first + run.num_rows]
            tokens = [row.token for row in rows]
            queries = query[:, :, tokens]
            owns = [
                stored.read(own, behind_keys(row.spans, run.num_shared))  # its own key is among them
                for row, own in zip(rows, queries.split(1, 2), strict=True)
            ]
            out[:, tokens] = _with_shared(queries, rows[0].spans, run.num_shared, owns, stored).transpose(1, 2)


def _runs_of(rows: Sequence[Sequence[Span]], *, shares_spans: bool) -> list[Run]:
    """Apart, each row has a run of its own: a product over one row rounds differently than one over several."""
    return runs_of(rows) if shares_spans else [Run(at) for at in range(len(rows))]


def _runs(rows: Sequence[PrefillRow], *, shares_spans: bool) -> list[tuple[Sequence[PrefillRow], int]]:
    """Return neighbours that begin with the same keys, and the number of these."""
    runs: list[tuple[Sequence[PrefillRow], int]] = []
    while rows:
        end = next((at for at in range(1, len(rows)) if rows[at - 1].end != rows[at].start), len(rows))
        found = _runs_of([row.context for row in rows[:end]], shares_spans=shares_spans)
        runs += ((rows[run.first : run.first + run.num_rows], run.num_shared) for run in found)
        rows = rows[end:]
    return runs


def _num_keys(row: PrefillRow) -> int:
    return row.length + sum(length for _, length in row.context)


def _apart(rows: Sequence[PrefillRow], fresh: Fresh) -> Iterator[tuple[PrefillRow, Fresh]]:
    """Yield each row of a run with what is its own."""
    for row in rows:
        yield row, fresh.narrow(row.start - rows[0].start, row.length)


def _prefill(rows: Sequence[PrefillRow], num_shared: int, fresh: Fresh, stored: Stored) -> torch.Tensor:
    """Attend a run's tokens `[1, num_heads, num_tokens, head_dim]`; the keys that its rows share are read once."""
    owns = [_own(row, num_shared, own, stored) for row, own in _apart(rows, fresh)]
    return _with_shared(fresh.query, rows[0].context, num_shared, owns, stored)


def _with_shared(
    query: torch.Tensor, spans: Sequence[Span], num_shared: int, owns: Sequence[Part], stored: Stored
) -> torch.Tensor:
    """Attend the first keys of `spans` for all of a run's rows, and merge that with what each has attended itself."""
    if not num_shared:
        return _merged(owns, 1)[0]
    return _merged([stored.read(query, first_keys(spans, num_shared)), *owns], 2)[0]


def _own(row: PrefillRow, num_shared: int, fresh: Fresh, stored: Stored) -> Part:
    """Attend a row's own keys and all of its context that is not shared."""
    parts = [attend_text(*fresh, is_causal=True, scale=stored.scale)]
    if rest := behind_keys(row.context, num_shared):
        parts.append(stored.read(fresh.query, rest))
    return _merged(parts, len(parts))


def _merged(parts: Sequence[Part], num_parts: int) -> Part:
    """Put what rows have attended side by side, and merge it by its log-sum-exps where each row has several parts."""
    if len(parts) == 1:
        return parts[0]
    outs, sums = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    if num_parts == 1:
        return outs, sums
    return merge_parts(outs, sums, num_parts), sums.unflatten(2, (num_parts, -1)).logsumexp(2)


def _windowed(row: PrefillRow, fresh: Fresh, stored: Stored, window: int) -> torch.Tensor:
    """Attend with an explicit band mask: only runs with a row that is longer than the model's window come here."""
    parts = [*(stored.of([span]) for span in row.context), (fresh.key, fresh.value)]
    keys, values = (torch.cat(each, 2) for each in zip(*parts, strict=True))
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
