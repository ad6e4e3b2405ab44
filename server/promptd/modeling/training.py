"""The differentiable packed forward: gradients reach input embeddings and learned prefixes, never the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from promptd.modeling.attention import causal_mask

if TYPE_CHECKING:
    from promptd.modeling.frozen import FrozenModel


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One training sequence: its input embeddings, and the learned prefix in front of it, if any."""

    input_embeds: torch.Tensor
    """`[num_tokens, hidden_size]`: soft prompt and embedded text, in order."""
    prefix: torch.Tensor | None = None
    """`[num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]`."""
    position_offset: int = 0
    """Position of the first token: `num_virtual_tokens` under the shifted convention."""


class TrainingBatch:
    """Rows attend causally to themselves and to their own prefix; nothing is stored."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self.rows = rows

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`, with autograd to queries, keys, values and prefixes."""
        outs, start = [], 0
        for row in self.rows:
            length = row.input_embeds.shape[0]
            own_query, own_key, own_value = (x.narrow(2, start, length) for x in (query, key, value))
            start += length
            num_context = 0
            if row.prefix is not None:
                prefix = row.prefix[layer].to(own_key.dtype).unsqueeze(1)  # [2, 1, num_kv_heads, n, head_dim]
                num_context = prefix.shape[3]
                own_key = torch.cat([prefix[0], own_key], 2)
                own_value = torch.cat([prefix[1], own_value], 2)
            plain = num_context == 0 and (window is None or length <= window)
            mask = None if plain else causal_mask(length, num_context, window, query.device)
            outs.append(
                scaled_dot_product_attention(
                    own_query,
                    own_key,
                    own_value,
                    attn_mask=mask,
                    is_causal=plain,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(outs, 2).transpose(1, 2)


def forward_training(
    model: FrozenModel, rows: Sequence[TrainingRow], logits_index: torch.Tensor | None = None
) -> torch.Tensor:
    """Run rows end to end in one pass.

    `logits_index` (`[num_logits]`, int64) picks packed tokens; None keeps all. Returns `[num_logits, vocab_size]`.
    """
    embeds = torch.cat([row.input_embeds for row in rows])
    positions = torch.cat(
        [
            torch.arange(row.position_offset, row.position_offset + row.input_embeds.shape[0], device=embeds.device)
            for row in rows
        ]
    )
    if logits_index is None:
        logits_index = torch.arange(embeds.shape[0], device=embeds.device)
    return model.forward(embeds.to(model.dtype), positions, logits_index, TrainingBatch(rows))
