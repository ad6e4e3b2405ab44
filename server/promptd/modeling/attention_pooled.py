"""Attention of texts that continue, on the CPU, without padding: single tokens read their keys where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from promptd.modeling.attention import Pair, Site, beside, merge_parts
from promptd.modeling.decode_kernel import DecodeKernel, RowPlan, kernel_over
from promptd.modeling.packed_batch import DecodeRow, PackedBatch, PrefillRow
from promptd.modeling.prefill_kernel import attend_text
from promptd.modeling.shared_spans import Run, Span, Spans, behind_keys, first_keys, num_keys, pieces_of, runs_of

Part = Pair
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

    def of(self, spans: Spans) -> list[Pair]:
        """Return the keys and values of each span, in place."""
        return [(self.keys.narrow(2, *span), self.values.narrow(2, *span)) for span in spans]

    def read(self, query: torch.Tensor, pieces: Iterable[Spans]) -> list[Part]:
        """Attend each of some pieces: in place where it is one span, else its keys are copied side by side."""
        return [attend_text(query, *beside(self.of(piece)), scale=self.scale) for piece in pieces]


class PooledAttention:
    """Serving attention: writes the step's keys and values to the pool, then attends."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self._decodes: dict[int | None, Decode] = {}  # by sliding window; the same in all layers
        self._texts = _texts(batch.prefill_rows, shares_spans=batch.shares_spans)

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
        for rows, read in self._texts:
            start, length = rows[0].start, sum(row.length for row in rows)
            own = fresh.narrow(start, length)
            if window is None or all(row.length + num_keys(row.context) <= window for row in rows):
                attended = _prefill(rows, read, own, stored)
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
    if kernel is None:
        return TorchDecode(rows, shares_spans=batch.shares_spans)
    return KernelDecode(rows, kernel, batch.pool.num_kv_heads)


def _nearest(spans: Spans, count: int) -> list[Span]:
    """Drop the keys that lie further back than the model's sliding window."""
    return behind_keys(spans, max(0, num_keys(spans) - count))


class KernelDecode:
    """All rows in one call of the kernel."""

    def __init__(self, rows: Sequence[DecodeRow], kernel: DecodeKernel, num_kv_heads: int) -> None:
        self._kernel = kernel
        self.plan = RowPlan.of(((row.token, row.spans) for row in rows), num_kv_heads)

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens."""
        self._kernel.attend(out, query, stored.keys, stored.values, stored.scale, self.plan)


class TorchDecode:
    """Run by run: what its rows share, then what is each row's own; merged by their log-sum-exps."""

    def __init__(self, rows: Sequence[DecodeRow], *, shares_spans: bool) -> None:
        # The last key is never shared: a row may stand beside one that continues it, and would have none of its own.
        self._reads = list(_reads([row.spans for row in rows], shares_spans=shares_spans, num_own=1))
        self._tokens = [row.token for row in rows]

    def attend(self, out: torch.Tensor, query: torch.Tensor, stored: Stored) -> None:
        """Fill these tokens."""
        for read in self._reads:
            tokens = self._tokens[read.run.first : read.run.end]
            queries = query[:, :, tokens]
            owns = [
                _merged(stored.read(row, pieces)) for row, pieces in zip(queries.split(1, 2), read.own, strict=True)
            ]
            out[:, tokens] = _merged([*stored.read(queries, read.shared), beside(owns)])[0].transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Read:
    """The keys of a run, in pieces that are a product each: what its rows share, and the rest of each row's."""

    run: Run
    shared: list[list[Span]]
    own: list[list[list[Span]]]


def _reads(rows: Sequence[Spans], *, shares_spans: bool, num_own: int = 0) -> Iterator[Read]:
    """Yield the runs of rows, which never share the last `num_own` keys of any.

    Apart, each row has a run of its own, since a product over one row rounds differently than one over several; and all
    of its keys are one piece, so that its bits do not depend on where they lie.
    """
    if not shares_spans:
        for at, spans in enumerate(rows):
            yield Read(Run(at), [], [[list(spans)] if spans else []])
        return
    for run in runs_of(first_keys(spans, num_keys(spans) - num_own) for spans in rows):
        behind = [behind_keys(spans, run.num_shared) for spans in rows[run.first : run.end]]
        yield Read(run, pieces_of(first_keys(rows[run.first], run.num_shared)), [pieces_of(spans) for spans in behind])


def _texts(rows: Sequence[PrefillRow], *, shares_spans: bool) -> list[tuple[Sequence[PrefillRow], Read]]:
    """Return the runs of rows, each of rows that lie side by side."""
    texts: list[tuple[Sequence[PrefillRow], Read]] = []
    while rows:
        end = next((at for at in range(1, len(rows)) if rows[at - 1].end != rows[at].start), len(rows))
        found = _reads([row.context for row in rows[:end]], shares_spans=shares_spans)
        texts += ((rows[read.run.first : read.run.end], read) for read in found)
        rows = rows[end:]
    return texts


def _apart(rows: Sequence[PrefillRow], fresh: Fresh) -> Iterator[tuple[PrefillRow, Fresh]]:
    """Yield each row of a run with what is its own."""
    for row in rows:
        yield row, fresh.narrow(row.start - rows[0].start, row.length)


def _prefill(rows: Sequence[PrefillRow], read: Read, fresh: Fresh, stored: Stored) -> torch.Tensor:
    """Attend a run's tokens `[1, num_heads, num_tokens, head_dim]`; the keys that its rows share are read once."""
    owns = [
        _merged([attend_text(*own, is_causal=True, scale=stored.scale), *stored.read(own.query, pieces)])
        for (_, own), pieces in zip(_apart(rows, fresh), read.own, strict=True)
    ]
    return _merged([*stored.read(fresh.query, read.shared), beside(owns)])[0]


def _merged(parts: Sequence[Part]) -> Part:
    """Merge what the same tokens have attended of several pieces, by its log-sum-exps."""
    if len(parts) == 1:
        return parts[0]
    outs, sums = beside(parts)
    return merge_parts(outs, sums, len(parts)), sums.unflatten(2, (len(parts), -1)).logsumexp(2)


def _windowed(row: PrefillRow, fresh: Fresh, stored: Stored, window: int) -> torch.Tensor:
    """Attend with an explicit band mask: only runs with a row that is longer than the model's window come here."""
    keys, values = beside([*stored.of(row.context), (fresh.key, fresh.value)])
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
