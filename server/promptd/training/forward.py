"""One differentiable pass over the rows of many prompts, each prompt standing once in front of all of its texts.

The keys and values of a prompt at positions 0..n-1 do not depend on the text behind it, so a pass runs a prompt's
tokens once for all of its texts instead of once a row, and the gradients of all texts meet in the one prompt. Prompts
of different jobs share the pass: linear layers run on all tokens at once, attention alone looks at who reads what.
A row never meets another group's tokens, so a group's numbers do not depend on its neighbours'. What stands in front
of a prompt and does not change, a chain of stored prompts say, is there as keys and values only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from promptd.training.padded_rows import padded_runs

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel, Site
    from promptd.modeling.attention import Attends
    from promptd.training.context import FrozenContext

SOFT_DIMS = 2
"""Dimensions of a soft prompt, `[n, hidden_size]`; a prefix has five."""


@dataclass(frozen=True, slots=True)
class PromptedTexts:
    """Texts that are read behind one prompt, and the tokens whose logits are wanted."""

    prompt: torch.Tensor | None
    """Soft `[n, hidden_size]`, prefix `[num_layers, 2, num_kv_heads, n, head_dim]`, or None for the bare model."""
    texts: Sequence[Sequence[int]]
    """What is read left to right."""
    logits_index: torch.Tensor
    """`[num_logits]`, int64: counts the tokens of these texts laid end to end, without the prompt; where there are none
    those of the sources."""
    context: FrozenContext | None = None
    """What the prompt and the texts are read behind."""
    sources: Sequence[Sequence[int]] = ()
    """What is read whole; the texts read one each, and begin anew with the first where there are more of them."""
    head: torch.Tensor | None = None
    """`[num_classes, hidden_size + 1]`, a linear head's weights, bias last: logits are classes', a row a source."""
    begun: Sequence[torch.Tensor] = ()
    """For each text the keys and values of its own beginning, like a prefix, where it only goes on from there."""
    num_target: int = 0
    """Rows of a soft prompt, its last, that stand in front of the texts and not in the sources."""

    @property
    def soft(self) -> torch.Tensor | None:
        """The prompt where it runs through the model, without what stands in front of the texts alone."""
        if self.prompt is None or self.prompt.dim() != SOFT_DIMS:
            return None
        return self.prompt[: len(self.prompt) - self.num_target]

    @property
    def target_soft(self) -> torch.Tensor | None:
        """What stands in front of the texts alone, where there is something."""
        if self.prompt is None or not self.num_target:
            return None
        return self.prompt[-self.num_target :]

    @property
    def prefix(self) -> torch.Tensor | None:
        """The prompt where it is keys and values already."""
        return self.prompt if self.prompt is not None and self.prompt.dim() != SOFT_DIMS else None

    @property
    def first_position(self) -> int:
        """Position of the prompt's first token."""
        return 0 if self.context is None else self.context.num_positions

    @property
    def text_position(self) -> int:
        """Position of every text's first token."""
        return self.first_position + (0 if self.prompt is None else self.prompt.shape[-2])

    @property
    def given_key_values(self) -> list[torch.Tensor]:
        """Keys and values that no token of the pass makes, in their order, each like a prefix."""
        context = [] if self.context is None else [self.context.key_values]
        return context if self.prefix is None else [*context, self.prefix]

    @property
    def text_positions(self) -> list[torch.Tensor]:
        """Positions of each text's tokens."""
        starts = [self.text_position + own.shape[3] for own in self.begun] or [self.text_position] * len(self.texts)
        return [torch.arange(start, start + len(text)) for start, text in zip(starts, self.texts, strict=True)]

    @property
    def num_text_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


def forward_groups(
    model: FrozenModel,
    groups: Sequence[PromptedTexts],
    *,
    between_layers: Callable[[], None] | None = None,
    kept: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Run all groups in one pass; return each one's logits, `[num_logits, vocab_size]` in float32.

    `between_layers` is called at every layer, in the forward pass and in the backward pass; what it does may take long
    but must not touch this pass. To `kept`, where it is given, each group's texts' keys and values are added,
    `[num_layers, 2, num_kv_heads, num_text_tokens, head_dim]`.
    """
    device = model.device
    texts = [text for group in groups for text in group.texts]
    embeds = model.embed(torch.tensor([token for text in texts for token in text], device=device))
    positions = [torch.arange(group.first_position, group.text_position) for group in groups if group.soft is not None]
    positions += [own for group in groups for own in group.text_positions]
    softs = [group.soft.to(embeds.dtype) for group in groups if group.soft is not None]
    start = sum(map(len, softs))
    index = []
    for group in groups:
        index.append(group.logits_index + start)
        start += group.num_text_tokens
    batch = GroupedBatch(groups, device, between_layers)
    recorded = Recorded(batch)
    logits = model.forward(
        torch.cat([*softs, embeds]),
        torch.cat(positions).to(device),
        torch.cat(index).to(device),
        batch if kept is None else recorded,
    )
    if kept is not None:
        of_texts = torch.stack(recorded.layers)[:, :, :, sum(map(len, softs)) :]
        kept += of_texts.split([group.num_text_tokens for group in groups], dim=3)
    return list(logits.float().split([len(group.logits_index) for group in groups]))


def forward_texts(
    model: FrozenModel, prompt: torch.Tensor | None, texts: Sequence[Sequence[int]], logits_index: torch.Tensor
) -> torch.Tensor:
    """Run one group; see `PromptedTexts`."""
    return forward_groups(model, [PromptedTexts(prompt, texts, logits_index)])[0]


class GroupedBatch:
    """Attention of one pass: a soft prompt sees its context and itself, a text sees both and itself, causally."""

    def __init__(
        self,
        groups: Sequence[PromptedTexts],
        device: torch.device,
        between_layers: Callable[[], None] | None = None,
    ) -> None:
        self._given = [one for group in groups for one in (*group.given_key_values, *group.begun)]
        lengths = [len(text) for group in groups for text in group.texts]
        softs = [len(group.soft) for group in groups if group.soft is not None]
        # Slots of the keys: the packed tokens (soft prompts, then texts), then what is given.
        of_softs, of_texts, next_soft, next_given = [], [], 0, sum(softs) + sum(lengths)
        for group in groups:
            num_given = sum(key_values.shape[3] for key_values in group.given_key_values)
            context = torch.arange(next_given, next_given + num_given)
            next_given += num_given
            if group.soft is not None:
                of_softs.append(context)
                context = torch.cat([context, torch.arange(next_soft, next_soft + len(group.soft))])
                next_soft += len(group.soft)
            for own in group.begun:
                of_texts.append(torch.cat([context, torch.arange(next_given, next_given + own.shape[3])]))
                next_given += own.shape[3]
            of_texts += [context] * (0 if group.begun else len(group.texts))
        self._rows = padded_runs(softs, of_softs, device)
        self._rows += padded_runs(lengths, of_texts, device, start=sum(softs))
        self._between_layers = between_layers

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        if self._between_layers is not None:
            self._between_layers()
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [num_tokens, heads, head_dim]
        if self._given:
            layers = [key_values[site.layer].to(key.dtype).transpose(1, 2) for key_values in self._given]
            key = torch.cat([key, *(keys_values[0] for keys_values in layers)])
            value = torch.cat([value, *(keys_values[1] for keys_values in layers)])
        out = torch.cat([rows.attend(site, query, key, value) for rows in self._rows])
        if self._between_layers is not None and out.requires_grad:
            out.register_hook(self._between_layers_backward)
        return out.unsqueeze(0)

    def _between_layers_backward(self, grad: torch.Tensor) -> None:
        if self._between_layers is not None:
            self._between_layers()


class Recorded:
    """Passes attention on and keeps the keys and values of every layer's own attention."""

    def __init__(self, inner: Attends) -> None:
        self._inner = inner
        self.layers: list[torch.Tensor] = []

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        if not site.is_cross:
            self.layers.append(torch.cat([key, value]))  # [2, num_kv_heads, n, head_dim]
        return self._inner.attend(site, query, key, value)


def prompt_key_values(
    model: FrozenModel, embeddings: torch.Tensor, context: FrozenContext | None = None
) -> torch.Tensor:
    """Return the prefix that a soft prompt `[n, hidden_size]` becomes behind a context.

    `[num_layers, 2, num_kv_heads, n, head_dim]`, with autograd to the soft prompt.
    """
    group = PromptedTexts(embeddings, [], torch.tensor([]), context)
    batch = Recorded(GroupedBatch([group], model.device))
    positions = torch.arange(group.first_position, group.text_position, device=model.device)
    model.forward(embeddings.to(model.device, model.dtype), positions, torch.tensor([0], device=model.device), batch)
    return torch.stack(batch.layers).float()
