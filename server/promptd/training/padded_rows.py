"""Packed rows, padded for one attention call each: which slots a token of theirs sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from promptd.modeling import Site
    from promptd.modeling.attention import PositionBias

MAX_PADDING = 2


class PaddedRows:
    """Consecutive rows of packed tokens, each behind a context of other slots; padded for one attention call."""

    def __init__(
        self,
        lengths: Sequence[int],
        contexts: Sequence[torch.Tensor],
        start: int,
        device: torch.device,
        *,
        is_causal: bool = True,
        has_own: bool = True,
    ) -> None:
        """`contexts`: for each row the slots before it, in order, `[num_slots]` int64; `start`: the first row's.

        Without `has_own` a row reads its context alone, and its own tokens are no keys: cross attention.
        """
        self._num_rows, self._longest = len(lengths), max(lengths)
        counts, behind = torch.tensor(lengths), torch.tensor([len(context) for context in contexts])
        starts = (counts.cumsum(0) - counts + start).unsqueeze(1)  # [num_rows, 1]
        at = torch.arange(self._longest)
        inside = at < counts.unsqueeze(1)  # [num_rows, longest]
        # Padding comes after a row's own tokens and reads its first one: causality hides it from all of them.
        self._queries = (starts + at * inside).flatten().to(device)
        self._kept = inside.flatten().nonzero().squeeze(1).to(device)  # [sum of lengths]
        ends = behind + counts if has_own else behind
        self._num_keys = int(ends.max())
        slot = torch.arange(self._num_keys)  # a row's keys: its context, then its own tokens
        own = (slot - behind.unsqueeze(1)).clamp_min(0)
        own = (starts + own * (own < counts.unsqueeze(1))) * has_own
        before = pad(pad_sequence(list(contexts), batch_first=True), (0, self._num_keys - int(behind.max())))
        self._keys = torch.where(slot < behind.unsqueeze(1), before, own).flatten().to(device)
        distinct = behind.unique()
        self._behind = (distinct if len(distinct) == 1 else behind).to(device)
        self._ends = None if is_causal else ends.to(device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend `[num_tokens, num_heads, head_dim]`, `[num_slots, num_kv_heads, head_dim]`; return these rows'."""
        queries = _padded(query, self._queries, self._num_rows)
        keys, values = (_padded(x, self._keys, self._num_rows) for x in (key, value))
        mask = self._mask(site, query)
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=site.scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._kept)

    def _mask(self, site: Site, like: torch.Tensor) -> torch.Tensor:
        """Return `[num_rows or 1, num_heads or 1, longest or 1, num_keys]`: what is added to the scores, -inf where a
        token does not see a slot. All layers of a pass have one bias."""
        window = site.window
        if window not in self._masks:
            at = self._behind.view(-1, 1, 1) + torch.arange(self._longest, device=like.device).view(1, -1, 1)
            slot = torch.arange(self._num_keys, device=like.device)
            if self._ends is None:
                seen = slot <= at if window is None else (slot <= at) & (slot > at - window)
            else:  # read whole: everything but the padding
                seen = slot < self._ends.view(-1, 1, 1)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            mask = mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)
            self._masks[window] = mask if site.bias is None else mask + self._bias(site.bias).to(like.dtype)
        return self._masks[window]

    def _bias(self, bias: PositionBias) -> torch.Tensor:
        """Return `[num_rows or 1, num_heads, longest, num_keys]`: keys lie one behind the other up to the row's end."""
        at, slot = (torch.arange(count, device=self._behind.device) for count in (self._longest, self._num_keys))
        distinct, which = self._behind.unique(return_inverse=True)
        return torch.cat([bias.between(at + behind, slot) for behind in distinct])[which]


def padded_runs(
    lengths: Sequence[int],
    contexts: Sequence[torch.Tensor],
    device: torch.device,
    *,
    start: int = 0,
    is_causal: bool = True,
    has_own: bool = True,
) -> list[PaddedRows]:
    """Return consecutive rows in runs that are padded together; see `PaddedRows`."""
    runs = []
    for first, last in _alike([len(context) + count for context, count in zip(contexts, lengths, strict=True)]):
        counts, own = lengths[first:last], contexts[first:last]
        runs.append(PaddedRows(counts, own, start, device, is_causal=is_causal, has_own=has_own))
        start += sum(counts)
    return runs


def _alike(num_keys: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut consecutive rows into runs `[first, last)` whose padded keys are at most `MAX_PADDING` times their own.

    A few rows behind a long document must not make room for one in front of all others.
    """
    first = total = widest = 0
    for at, count in enumerate(num_keys):
        if (at + 1 - first) * max(widest, count) > MAX_PADDING * (total + count):
            yield first, at
            first, total, widest = at, 0, 0
        total, widest = total + count, max(widest, count)
    if num_keys:
        yield first, len(num_keys)


def _padded(packed: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Gather `[num_slots, heads, head_dim]` into `[num_rows, heads, padded length, head_dim]`."""
    rows: torch.Tensor = packed.index_select(0, index).unflatten(0, (num_rows, -1))
    return rows.transpose(1, 2)
