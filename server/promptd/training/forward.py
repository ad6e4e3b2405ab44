"""One differentiable pass over the rows of many prompts, each prompt standing once in front of all of its texts.

The keys and values of a prompt at positions 0..n-1 do not depend on the text behind it, so a pass runs a prompt's
tokens once for all of its texts instead of once a row, and the gradients of all texts meet in the one prompt. Prompts
of different jobs share the pass: linear layers run on all tokens at once, attention alone looks at who reads what.
A row never meets another group's tokens, so a group's numbers do not depend on its neighbours'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel

SOFT_DIMS = 2
"""Dimensions of a soft prompt, `[n, hidden_size]`; a prefix has five."""


@dataclass(frozen=True, slots=True)
class PromptedTexts:
    """Texts that are read behind one prompt, and the tokens whose logits are wanted."""

    prompt: torch.Tensor | None
    """Soft `[n, hidden_size]`, prefix `[num_layers, 2, num_kv_heads, n, head_dim]`, or None for the bare model."""
    texts: Sequence[Sequence[int]]
    logits_index: torch.Tensor
    """`[num_logits]`, int64: counts the tokens of these texts laid end to end, without the prompt."""

    @property
    def soft(self) -> torch.Tensor | None:
        """The prompt where it runs through the model."""
        return self.prompt if self.prompt is not None and self.prompt.dim() == SOFT_DIMS else None

    @property
    def prefix(self) -> torch.Tensor | None:
        """The prompt where it is keys and values already."""
        return self.prompt if self.prompt is not None and self.prompt.dim() != SOFT_DIMS else None

    @property
    def num_virtual_tokens(self) -> int:
        """Keys in front of every text; texts start at this position."""
        return 0 if self.prompt is None else self.prompt.shape[-2]

    @property
    def num_text_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


def forward_groups(
    model: FrozenModel, groups: Sequence[PromptedTexts], *, between_layers: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """Run all groups in one pass; return each one's logits, `[num_logits, vocab_size]` in float32.

    `between_layers` is called at every layer, in the forward pass and in the backward pass; what it does may take long
    but must not touch this pass.
    """
    device = model.device
    texts = [text for group in groups for text in group.texts]
    embeds = model.embed(torch.tensor([token for text in texts for token in text], device=device))
    positions = [torch.arange(len(group.soft)) for group in groups if group.soft is not None]
    positions += [
        torch.arange(group.num_virtual_tokens, group.num_virtual_tokens + len(text))
        for group in groups
        for text in group.texts
    ]
    softs = [group.soft.to(embeds.dtype) for group in groups if group.soft is not None]
    start = sum(map(len, softs))
    index = []
    for group in groups:
        index.append(group.logits_index + start)
        start += group.num_text_tokens
    logits = model.forward(
        torch.cat([*softs, embeds]),
        torch.cat(positions).to(device),
        torch.cat(index).to(device),
        GroupedBatch(groups, device, between_layers),
    )
    return list(logits.float().split([len(group.logits_index) for group in groups]))


def forward_texts(
    model: FrozenModel, prompt: torch.Tensor | None, texts: Sequence[Sequence[int]], logits_index: torch.Tensor
) -> torch.Tensor:
    """Run one group; see `PromptedTexts`."""
    return forward_groups(model, [PromptedTexts(prompt, texts, logits_index)])[0]


class GroupedBatch:
    """Attention of one pass: a soft prompt's tokens see each other, a text sees its prompt and itself, causally."""

    def __init__(
        self,
        groups: Sequence[PromptedTexts],
        device: torch.device,
        between_layers: Callable[[], None] | None = None,
    ) -> None:
        softs = [0 if group.soft is None else len(group.soft) for group in groups]
        self._prefixes = [group.prefix for group in groups if group.prefix is not None]
        num_tokens = sum(softs) + sum(group.num_text_tokens for group in groups)
        # Slots of the keys: the packed tokens (soft prompts, then texts), then the prefixes.
        contexts, soft_start, prefix_start = [], 0, num_tokens
        for group, num_soft in zip(groups, softs, strict=True):
            is_soft = group.prefix is None
            start = soft_start if is_soft else prefix_start
            contexts.append(range(start, start + group.num_virtual_tokens))
            soft_start += num_soft
            prefix_start += 0 if is_soft else group.num_virtual_tokens
        self._rows = []
        if soft_start:
            self._rows.append(_Rows([num for num in softs if num], [range(0)] * sum(map(bool, softs)), 0, device))
        lengths = [len(text) for group in groups for text in group.texts]
        of_texts = [context for group, context in zip(groups, contexts, strict=True) for _ in group.texts]
        self._rows.append(_Rows(lengths, of_texts, soft_start, device))
        self._between_layers = between_layers

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        if self._between_layers is not None:
            self._between_layers()
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [num_tokens, heads, head_dim]
        if self._prefixes:
            layers = [prefix[layer].to(key.dtype).transpose(1, 2) for prefix in self._prefixes]
            key = torch.cat([key, *(keys_values[0] for keys_values in layers)])
            value = torch.cat([value, *(keys_values[1] for keys_values in layers)])
        out = torch.cat([rows.attend(query, key, value, scale, window) for rows in self._rows])
        if self._between_layers is not None and out.requires_grad:
            out.register_hook(self._between_layers_backward)
        return out.unsqueeze(0)

    def _between_layers_backward(self, grad: torch.Tensor) -> None:
        if self._between_layers is not None:
            self._between_layers()


class _Rows:
    """Consecutive rows of packed tokens, each behind a context of other slots; padded for one attention call."""

    def __init__(self, lengths: Sequence[int], contexts: Sequence[range], start: int, device: torch.device) -> None:
        self._num_rows, self._longest = len(lengths), max(lengths)
        counts, behind = torch.tensor(lengths), torch.tensor([len(context) for context in contexts])
        starts = (counts.cumsum(0) - counts + start).unsqueeze(1)  # [num_rows, 1]
        at = torch.arange(self._longest)
        inside = at < counts.unsqueeze(1)  # [num_rows, longest]
        # Padding comes after a row's own tokens and reads its first one: causality hides it from all of them.
        self._queries = (starts + at * inside).flatten().to(device)
        self._kept = inside.flatten().nonzero().squeeze(1).to(device)  # [sum of lengths]
        self._num_keys = int((behind + counts).max())
        slot = torch.arange(self._num_keys)  # a row's keys: its context, then its own tokens
        own = (slot - behind.unsqueeze(1)).clamp_min(0)
        own = starts + own * (own < counts.unsqueeze(1))
        first = torch.tensor([context.start for context in contexts]).unsqueeze(1)
        self._keys = torch.where(slot < behind.unsqueeze(1), first + slot, own).flatten().to(device)
        distinct = behind.unique()
        self._behind = (distinct if len(distinct) == 1 else behind).to(device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attend `[num_tokens, num_heads, head_dim]`, `[num_slots, num_kv_heads, head_dim]`; return these rows'."""
        queries = _padded(query, self._queries, self._num_rows)
        keys, values = (_padded(x, self._keys, self._num_rows) for x in (key, value))
        mask = self._mask(window, query)
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._kept)

    def _mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Return `[num_rows or 1, 1, longest, num_keys]`: 0 where a token sees a slot, else -inf."""
        if window not in self._masks:
            at = self._behind.view(-1, 1, 1) + torch.arange(self._longest, device=like.device).view(1, -1, 1)
            slot = torch.arange(self._num_keys, device=like.device)
            seen = slot <= at if window is None else (slot <= at) & (slot > at - window)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._masks[window] = mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)
        return self._masks[window]


def _padded(packed: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Gather `[num_slots, heads, head_dim]` into `[num_rows, heads, padded length, head_dim]`."""
    rows: torch.Tensor = packed.index_select(0, index).unflatten(0, (num_rows, -1))
    return rows.transpose(1, 2)


class _RecordingBatch:
    """Attention of one causal sequence that keeps every layer's keys and values."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.layers: list[torch.Tensor] = []
        self._rows = _Rows([num_tokens], [range(0)], 0, device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        self.layers.append(torch.cat([key, value]))  # [2, num_kv_heads, n, head_dim]
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return self._rows.attend(query, key, value, scale, window).unsqueeze(0)


def prompt_key_values(model: FrozenModel, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the prefix that a soft prompt `[n, hidden_size]` becomes.

    `[num_layers, 2, num_kv_heads, n, head_dim]`, with autograd to the soft prompt.
    """
    batch = _RecordingBatch(len(embeddings), model.device)
    positions = torch.arange(len(embeddings), device=model.device)
    model.forward(embeddings.to(model.device, model.dtype), positions, positions[-1:], batch)
    return torch.stack(batch.layers).float()
