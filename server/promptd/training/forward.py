"""One differentiable pass in which a prompt stands once and many texts read it.

The keys and values of a prompt at positions 0..n-1 do not depend on the text behind it, so a training step runs the
prompt's tokens once for the whole batch instead of once a row; with prompts about as long as the texts of a
classification task this halves the work. Gradients of all texts meet in the one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from promptd.modeling.attention import causal_mask

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel

SOFT_DIMS = 2
"""Dimensions of a soft prompt, `[n, hidden_size]`; a prefix has five."""


def forward_texts(
    model: FrozenModel,
    prompt: torch.Tensor | None,
    texts: Sequence[Sequence[int]],
    logits_index: torch.Tensor,
    *,
    position_offset: int | None = None,
) -> torch.Tensor:
    """Run every text behind the same prompt and return logits `[num_logits, vocab_size]` in float32.

    `prompt` is a soft prompt `[n, hidden_size]`, a prefix `[num_layers, 2, num_kv_heads, n, head_dim]` or None for the
    bare model. `logits_index` (`[num_logits]`, int64) counts tokens of the texts laid end to end, without the prompt.
    Texts start at position n unless `position_offset` says otherwise.
    """
    soft = prompt if prompt is not None and prompt.dim() == SOFT_DIMS else None
    prefix = prompt if prompt is not None and prompt.dim() != SOFT_DIMS else None
    num_soft = 0 if soft is None else soft.shape[0]
    offset = position_offset
    if offset is None:
        offset = num_soft if prefix is None else prefix.shape[3]
    device = model.device
    embeds = model.embed(torch.tensor([token for text in texts for token in text], device=device))
    positions = [torch.arange(offset, offset + len(text), device=device) for text in texts]
    if soft is not None:
        embeds = torch.cat([soft.to(embeds.dtype), embeds])
        positions.insert(0, torch.arange(num_soft, device=device))
    batch = SharedPromptBatch([len(text) for text in texts], num_soft, prefix, device)
    logits = model.forward(embeds, torch.cat(positions), logits_index.to(device) + num_soft, batch)
    return logits.float()


class SharedPromptBatch:
    """Attention of one pass: the prompt's tokens see each other, every text sees the prompt and itself, causally."""

    def __init__(
        self, lengths: Sequence[int], num_soft: int, prefix: torch.Tensor | None, device: torch.device
    ) -> None:
        self.num_soft = num_soft
        self.prefix = prefix
        self.num_texts, self.longest = len(lengths), max(lengths)
        counts = torch.tensor(lengths)
        starts = counts.cumsum(0) - counts + num_soft
        columns = torch.arange(self.longest)
        inside = columns < counts.unsqueeze(1)  # [num_texts, longest]
        # Padding comes after a text's own tokens and reads its first one: causality hides it from all of them.
        self.gather = (starts.unsqueeze(1) + columns * inside).flatten().to(device)
        self.scatter = inside.flatten().nonzero().squeeze(1).to(device)  # [sum of lengths]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        context = self._context(layer, key, value)
        queries, keys, values = (self._padded(x) for x in (query, key, value))
        if context is not None:
            shared = [part.expand(self.num_texts, -1, -1, -1) for part in context]
            keys, values = torch.cat([shared[0], keys], 2), torch.cat([shared[1], values], 2)
        out = _causal_attention(queries, keys, values, scale, window)
        flat = out.flatten(0, 1).index_select(0, self.scatter)  # [text tokens, num_heads, head_dim]
        if self.num_soft:
            own_query, own_key, own_value = (x[:, :, : self.num_soft] for x in (query, key, value))
            flat = torch.cat([_causal_attention(own_query, own_key, own_value, scale, window)[0], flat])
        return flat.unsqueeze(0)

    def _context(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the prompt's keys and values at this layer, `[1, num_kv_heads, n, head_dim]` each."""
        if self.prefix is not None:
            keys, values = self.prefix[layer].to(key.dtype).unsqueeze(1).unbind(0)
            return keys, values
        if self.num_soft:
            return key[:, :, : self.num_soft], value[:, :, : self.num_soft]
        return None

    def _padded(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn `[1, heads, num_tokens, head_dim]` into `[num_texts, heads, longest, head_dim]`."""
        rows: torch.Tensor = packed[0].index_select(1, self.gather).unflatten(1, (self.num_texts, self.longest))
        return rows.transpose(0, 1)


class _RecordingBatch:
    """Attention of one causal sequence that keeps every layer's keys and values."""

    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        self.layers.append(torch.cat([key, value]))  # [2, num_kv_heads, n, head_dim]
        return _causal_attention(query, key, value, scale, window)


def _causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attend `[batch, heads, tokens, head_dim]` to keys that end with the tokens' own; heads come after tokens."""
    num_tokens = query.shape[2]
    mask = causal_mask(num_tokens, key.shape[2] - num_tokens, window, query.device)
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def prompt_key_values(model: FrozenModel, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the prefix that a soft prompt `[n, hidden_size]` becomes.

    `[num_layers, 2, num_kv_heads, n, head_dim]`, with autograd to the soft prompt.
    """
    batch = _RecordingBatch()
    num_tokens = embeddings.shape[0]
    positions = torch.arange(num_tokens, device=model.device)
    model.forward(embeddings.to(model.device, model.dtype), positions, positions[-1:], batch)
    return torch.stack(batch.layers).float()
