"""Attention of sources, which are read whole, and of targets that read them by cross attention or have a position bias.

Rows attend their spans one after the other; single tokens, which are what a target mostly is, all at once by the
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from promptd.modeling.attention import Pair, Site, beside, flash_attention
from promptd.modeling.decode_kernel import RowPlan, kernel_over
from promptd.modeling.packed_batch import PackedBatch, PackedRow, own_spans
from promptd.modeling.shared_spans import Span, num_keys

Heads = Pair
"""Keys and values of one layer, `[1, num_kv_heads, num_slots, head_dim]` each."""


@dataclass(slots=True)
class _Plan:
    """One row: its tokens `[start, start + length)`, and the spans it reads in front of its own keys."""

    row: PackedRow
    start: int
    length: int
    spans: Sequence[Span]
    has_own: bool
    """Whether its own keys come with the call; a single token's lie in the last of the spans."""

    @property
    def num_keys(self) -> int:
        """All keys that the row reads."""
        return num_keys(self.spans) + (self.length if self.has_own else 0)


class RowAttention:
    """Attention of one batch on any device. Rows of a causal batch store their keys and values first.

    Where there is a kernel it attends all single tokens of a causal batch in one call.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self._batch = batch
        plans = [_plan(row, start, batch.is_causal) for row, start in zip(batch.rows, batch.row_starts, strict=True)]
        self._kernel = kernel_over(batch.pool.keys)
        singles = [plan for plan in plans if self._kernel is not None and not plan.has_own]
        self._plans = [plan for plan in plans if self._kernel is None or plan.has_own]
        heads, cross = batch.pool.num_kv_heads, [plan for plan in singles if plan.row.cross]
        self._own_singles = RowPlan.of(((plan.start, plan.spans) for plan in singles), heads)
        self._cross_singles = RowPlan.of(((plan.start, plan.row.cross) for plan in cross), heads)
        self._masks: list[torch.Tensor | None] | None = None

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        pool, layer = self._batch.pool, site.layer
        if self._batch.is_causal and not site.is_cross:
            pool.write(layer, self._batch.slot_mapping, key, value)
        stored = pool.heads(layer)
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        singles = self._cross_singles if site.is_cross else self._own_singles
        if self._kernel is not None and singles.struct.num_runs:
            bias = None if site.bias is None else site.bias.behind
            self._kernel.attend(out, query, *stored, site.scale, singles, bias)
        for number, plan in enumerate(self._plans):
            own = query.narrow(2, plan.start, plan.length)
            if site.is_cross:
                attended = _attend(own, _views(stored, plan.row.cross), None, site.scale)
            else:
                parts = _views(stored, plan.spans)
                if plan.has_own:
                    parts.append((key.narrow(2, plan.start, plan.length), value.narrow(2, plan.start, plan.length)))
                attended = _attend(own, parts, self._mask(number, site), site.scale)
            out[:, plan.start : plan.start + plan.length] = attended.transpose(1, 2)
        return out

    def _mask(self, number: int, site: Site) -> torch.Tensor | None:
        """Return what is added to a row's scores, `[1, num_heads or 1, length, num_keys]`; the same in every layer."""
        if self._masks is None:
            self._masks = [self._make_mask(plan, site) for plan in self._plans]
        return self._masks[number]

    def _make_mask(self, plan: _Plan, site: Site) -> torch.Tensor | None:
        mask = None
        pool = self._batch.pool.keys
        first = plan.row.first_position
        queries = torch.arange(first, first + plan.length, device=pool.device)
        # Keys lie one behind the other up to the row's last token.
        keys = torch.arange(first + plan.length - plan.num_keys, first + plan.length, device=pool.device)
        if site.bias is not None:
            mask = site.bias.between(queries, keys).to(pool.dtype)
        if self._batch.is_causal and plan.length > 1:
            hidden = torch.zeros(1, 1, plan.length, plan.num_keys, dtype=pool.dtype, device=pool.device)
            hidden.masked_fill_(keys > queries.unsqueeze(1), float("-inf"))
            mask = hidden if mask is None else mask + hidden
        return mask


def _plan(row: PackedRow, start: int, is_causal: bool) -> _Plan:
    length = len(row.token_ids)
    if not is_causal or length > 1:
        return _Plan(row, start, length, row.context, has_own=True)
    return _Plan(row, start, length, own_spans(row), has_own=False)  # stored before it is read


def _views(stored: Heads, spans: Sequence[Span]) -> list[Heads]:
    return [(stored[0].narrow(2, start, count), stored[1].narrow(2, start, count)) for start, count in spans]


def _attend(query: torch.Tensor, parts: list[Heads], mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Attend `[1, num_heads, length, head_dim]` to all parts, side by side."""
    if mask is not None:
        mask = mask.expand(-1, query.shape[1], -1, -1)
    return flash_attention(query, *beside(parts), mask, scale)[0]
