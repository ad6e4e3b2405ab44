"""Attention over packed rows: one function for every model, registered with transformers.

The function is registered under a name that has no mask function, so transformers builds no mask; the batch reaches
it through the model's `**kwargs`. Where a row's keys are attended in parts, these are merged by their log-sum-exp,
which is exact: softmax over a union is the softmax over the parts, weighted by each part's share of the total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from promptd.errors import ModelRefusedError
from promptd.modeling.recording import opaque

ATTENTION_NAME = "promptd"
Pair = tuple[torch.Tensor, torch.Tensor]

# (query, key, value) -> (output, log-sum-exp of the scores): the second is what lets parts be merged
flash_cpu: Callable[..., Pair] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

#: Arguments that change the result and that we do not implement; a model that passes one is refused.
_REFUSED_ARGUMENTS = ("softcap", "s_aux", "attn_bias", "block_mask")


class PositionBias(Protocol):
    """What a model adds to its scores for the distance of two positions; the same in all of its layers."""

    behind: torch.Tensor
    """`[num_heads, reach + 1]`, fp32, contiguous: of keys `reach` to 0 tokens back; farther ones have the first."""

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
    return opaque(_attend, batch, site, query, key, value), None


def _attend(batch: Attends, *args: Any) -> torch.Tensor:
    return batch.attend(*args)


AttentionInterface.register(ATTENTION_NAME, packed_attention)


def attend_by(hf: PreTrainedModel, name: str) -> None:
    """Have all stacks of a model attend by a registered function, or by one of transformers' own.

    transformers before 5.20 alone would pass over stacks whose configuration is a copy of the model's, as T5's are.
    """
    for stack in hf.modules():
        if isinstance(stack, PreTrainedModel):
            stack.set_attn_implementation(name)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one row `[1, num_heads, length, head_dim]`; return it and its log-sum-exps `[1, num_heads, length]`.

    `mask` is added to the scores. Elsewhere than on the CPU this is plain products, in float32.
    """
    if query.device.type == "cpu":
        return flash_cpu(query, key, value, attn_mask=mask, scale=scale)
    group = query.shape[1] // key.shape[1]
    keys, values = (stored.repeat_interleave(group, 1).float() for stored in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ values).to(query.dtype), scores.logsumexp(-1)


def beside(parts: Sequence[Pair]) -> Pair:
    """Put keys and values, or outputs and log-sum-exps, side by side: `[1, H, n, ...]` each, n of its own."""
    if len(parts) == 1:
        return parts[0]
    first, second = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return first, second


def merge_parts(outs: torch.Tensor, log_sums: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Merge part-major outputs `[1, H, parts * rows, D]` by their log-sum-exps into `[1, H, rows, D]`."""
    weights = torch.softmax(log_sums.unflatten(2, (num_parts, -1)), dim=2).unsqueeze(-1)
    parts = outs.unflatten(2, (num_parts, -1))
    merged: torch.Tensor = (parts * weights).sum(2).to(outs.dtype)
    return merged
