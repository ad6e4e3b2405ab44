"""The differentiable pass where texts are read whole: classes read off many prompts' texts at once.

There a prompt's keys depend on the text, so a soft prompt stands in every one of its texts, behind the first token (as
in Residual Prompt Tuning, section 3: `[CLS]`, the prompt, the sentence), and the gradients of all of them meet in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from promptd.training.forward import GroupedBatch, PaddedRows, PromptedTexts, Recorded

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel


class SourceBatch(GroupedBatch):
    """Attention of one pass: every token of a row sees the row and the prefix in front of it."""

    def __init__(
        self,
        groups: Sequence[PromptedTexts],
        lengths: Sequence[int],
        device: torch.device,
        between_layers: Callable[[], None] | None = None,
    ) -> None:
        """`lengths`: tokens of every group's rows, soft prompts and all."""
        self._given = [group.prefix for group in groups if group.prefix is not None]
        self._between_layers = between_layers
        contexts, next_given = [], sum(lengths)
        for group in groups:
            num_given = 0 if group.prefix is None else group.prefix.shape[3]
            contexts += [torch.arange(next_given, next_given + num_given)] * len(group.texts)
            next_given += num_given
        self._rows = [PaddedRows(lengths, contexts, 0, device, is_causal=False)]


def forward_sources(
    model: FrozenModel, groups: Sequence[PromptedTexts], *, between_layers: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """Run all groups in one pass; return each one's class logits, `[num_texts, num_classes]` in float32.

    A group without a head, the bare model's, tells nothing apart: its logits are `[num_texts, 1]` of zeros.
    """
    device = model.device
    rows, positions, lengths = [], [], []
    for group in groups:
        first = 0 if group.prefix is None else group.prefix.shape[3]
        for text in group.texts:
            embeds = model.embed(torch.tensor(list(text), device=device))
            if group.soft is not None:
                embeds = torch.cat([embeds[:1], group.soft.to(embeds.dtype), embeds[1:]])
            rows.append(embeds)
            lengths.append(len(embeds))
            positions.append(torch.arange(first, first + len(embeds)))
    batch = SourceBatch(groups, lengths, device, between_layers)
    hidden = model.read_whole(torch.cat(rows), torch.cat(positions).to(device), batch)
    ends = torch.tensor(lengths).cumsum(0)
    features = model.pooled(hidden[(ends - torch.tensor(lengths)).to(device)]).float()
    logits = []
    for group, own in zip(groups, features.split([len(group.texts) for group in groups]), strict=True):
        head = torch.zeros(1, own.shape[1] + 1, device=device) if group.head is None else group.head
        logits.append(linear(own, head[:, :-1], head[:, -1]))
    return logits


def source_key_values(model: FrozenModel, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the prefix that a soft prompt `[n, hidden_size]` becomes, read alone.

    `[num_layers, 2, num_kv_heads, n, head_dim]`.
    """
    count = len(embeddings)
    alone = PromptedTexts(None, [range(count)], torch.tensor([]))
    batch = Recorded(SourceBatch([alone], [count], model.device))
    positions = torch.arange(count, device=model.device)
    model.read_whole(embeddings.to(model.device, model.dtype), positions, batch)
    return torch.stack(batch.layers).float()
