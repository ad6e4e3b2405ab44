"""Attention over packed rows: one function for every model, registered with transformers.

The function is registered under a name that has no mask function, so transformers builds no mask; the batch reaches
it through the model's `**kwargs`. On the CPU a row attends each of its K/V spans in place (no padding, no gather)
and the parts are merged by their log-sum-exp, which is exact: softmax over a union is the softmax over the parts,
weighted by each part's share of the total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from promptd.errors import ModelRefusedError
from promptd.modeling.packed_batch import DecodeGroup, PackedBatch, PrefillRow

ATTENTION_NAME = "promptd"

# (query, key, value) -> (output, log-sum-exp of the scores): the second is what lets parts be merged
_flash: Callable[..., tuple[torch.Tensor, torch.Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
)

#: Arguments that change the result and that we do not implement; a model that passes one is refused.
_REFUSED_ARGUMENTS = ("softcap", "s_aux", "attn_bias", "block_mask")


class PositionBias(Protocol):
    """What a model adds to its scores for the distance of two positions; the same in all of its layers."""

    def between(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_heads, num_queries, num_keys]` for positions `[num_queries]` and `[num_keys]`, int64."""


NO_BIAS = object()
"""Stands for a bias of zero where a model would make one for the whole packed length if it were given none."""


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of the model, as it calls."""

    layer: int
    scale: float
    window: int | None = None
    bias: PositionBias | None = None
    is_cross: bool = False
    """Whether it reads the source's keys and values; those that come with the call are placeholders."""


class Attends(Protocol):
    """What travels through the model's `batch=` argument."""

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Map `[1, heads, num_tokens, head_dim]` to `[1, num_tokens, num_heads, head_dim]`."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: Attends | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_bias: PositionBias | object | None = None,
    is_cross: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hand one layer's attention to the batch that travels with the call."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    if batch is None:
        raise ModelRefusedError(f"layer {layer}: {type(module).__name__} does not pass our batch to its attention")
    for name in _REFUSED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ModelRefusedError(f"layer {layer}: attention argument {name!r} is not implemented")
    if isinstance(position_bias, torch.Tensor):  # made for the packed length: no hook of ours stood in front
        raise ModelRefusedError(f"layer {layer}: attention argument 'position_bias' is not implemented")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    bias = None if position_bias is NO_BIAS else position_bias
    site = Site(layer, scale, sliding_window, bias, is_cross)  # type: ignore[arg-type]
    return batch.attend(site, query, key, value), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)


class PooledAttention:
    """Serving attention: writes the step's keys and values to the pool, then attends row by row on the CPU."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self._decodes: dict[int | None, list[Decode]] = {}  # by sliding window; the same in all layers

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`; rows may read slots that this very call writes."""
        batch, scale, window = self.batch, site.scale, site.window
        batch.pool.write(site.layer, batch.slot_mapping, key, value)
        keys, values = batch.pool.heads(site.layer)
        if window not in self._decodes:
            groups = list(batch.decode_groups.values())
            groups = groups if window is None else _clipped(groups, window)
            self._decodes[window] = [Decode(group, shares_spans=batch.shares_spans) for group in groups]
        decodes = self._decodes[window]
        if not batch.prefill_rows and len(decodes) == 1:  # the usual decode step: rows are already in order
            return decodes[0].attend(query, keys, values, scale).transpose(1, 2)
        out = query.new_empty(query.shape)  # [1, num_heads, num_tokens, head_dim]
        for decode in decodes:
            out[:, :, decode.tokens] = decode.attend(query[:, :, decode.tokens], keys, values, scale)
        for row in batch.prefill_rows:
            own = slice(row.start, row.start + row.length)
            out[:, :, own] = self._prefill(
                row, query[:, :, own], key[:, :, own], value[:, :, own], keys, values, scale, window
            )
        return out.transpose(1, 2)

    @staticmethod
    def _prefill(
        row: PrefillRow,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if window is not None and row.length + sum(length for _, length in row.context) > window:
            return _windowed(row, query, key, value, keys, values, scale, window)
        own, own_sum = _flash(query, key, value, is_causal=True, scale=scale)
        if not row.context:
            return own
        outs, sums = [own], [own_sum]
        for start, length in row.context:
            out, log_sum = _flash(query, keys.narrow(2, start, length), values.narrow(2, start, length), scale=scale)
            outs.append(out)
            sums.append(log_sum)
        return merge_parts(torch.cat(outs, 2), torch.cat(sums, 2), len(outs))


class Decode:
    """Attention of a group's single tokens, in place: span by span, a span that adjacent rows share once for them."""

    def __init__(self, group: DecodeGroup, *, shares_spans: bool) -> None:
        self.tokens = group.tokens
        self._parts = [group.runs(part, shares_spans=shares_spans) for part in range(group.num_parts)]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Map the group's `[1, num_heads, num_rows, head_dim]` to the same."""
        outs: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for counts, spans in self._parts:
            for own, (start, length) in zip(query.split(counts, 2), spans, strict=True):
                out, log_sum = _flash(own, keys.narrow(2, start, length), values.narrow(2, start, length), scale=scale)
                outs.append(out)
                sums.append(log_sum)
        merged = torch.cat(outs, 2)
        return merged if len(self._parts) == 1 else merge_parts(merged, torch.cat(sums, 2), len(self._parts))


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one row `[1, num_heads, length, head_dim]`; return it and its log-sum-exps `[1, num_heads, length]`.

    `mask` is added to the scores. Elsewhere than on the CPU this is plain products, in float32.
    """
    if query.device.type == "cpu":
        return _flash(query, key, value, attn_mask=mask, scale=scale)
    group = query.shape[1] // key.shape[1]
    keys, values = (stored.repeat_interleave(group, 1).float() for stored in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ values).to(query.dtype), scores.logsumexp(-1)


def merge_parts(outs: torch.Tensor, log_sums: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Merge part-major outputs `[1, H, parts * rows, D]` by their log-sum-exps into `[1, H, rows, D]`."""
    weights = torch.softmax(log_sums.unflatten(2, (num_parts, -1)), dim=2).unsqueeze(-1)
    parts = outs.unflatten(2, (num_parts, -1))
    merged: torch.Tensor = (parts * weights).sum(2).to(outs.dtype)
    return merged


def _clipped(groups: list[DecodeGroup], window: int) -> list[DecodeGroup]:
    """Regroup decode rows after dropping the keys that lie further back than the model's sliding window."""
    clipped: dict[int, DecodeGroup] = {}
    rows = [row for group in groups for row in zip(group.tokens, group.spans, strict=True)]
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
    """Attend with an explicit band mask: only rows longer than the model's window come here."""
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
