"""The differentiable pass where texts are read whole: classes, or the words at a mask, read off many prompts' texts.

A soft prompt stands behind the first token there (as in Residual Prompt Tuning, section 3: `[CLS]`, the prompt, the
sentence).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from promptd.training.forward import PromptedTexts, Recorded
from promptd.training.sides import Side, SideBatch, pack, source_side

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel


def forward_sources(
    model: FrozenModel, groups: Sequence[PromptedTexts], *, between_layers: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """Run all groups in one pass; return each one's logits in float32.

    Of a group with a head those of its classes, `[num_sources, num_classes]`; of another those of the vocabulary at the
    places of `logits_index`, `[num_logits, vocab_size]`.
    """
    sides = [source_side(model, group) for group in groups]
    packed = pack(model, sides)
    batch = SideBatch(sides, packed.lengths, model.device, between_layers)
    hidden = model.read_whole(packed.embeds, packed.positions, batch)
    starts, at = torch.tensor(packed.starts), 0
    firsts, masks = [], []
    for group, places in zip(groups, packed.places, strict=True):
        if group.head is not None:
            firsts.append(starts[at : at + len(group.sources)])
        else:
            masks.append(places[group.logits_index])
        at += len(group.sources)
    features, words = _read(model.pooled, hidden, firsts), _read(model.predict_words, hidden, masks)
    return [next(words) if group.head is None else _classes(next(features), group.head) for group in groups]


def _classes(features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    head = head.to(features)
    return linear(features, head[:, :-1], head[:, -1])


def _read(
    read: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, places: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Read what stands at all places in one call; return each one's part in float32."""
    if not places:
        return iter(())
    return iter(read(hidden[torch.cat(list(places)).to(hidden.device)]).float().split([len(own) for own in places]))


def source_key_values(model: FrozenModel, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prefix that a soft prompt `[n, hidden_size]` becomes, read alone, and its hidden states.

    `[num_layers, 2, num_kv_heads, n, head_dim]` and `[n, hidden_size]`.
    """
    count = len(embeddings)
    batch = Recorded(SideBatch([Side([range(count)])], [count], model.device))
    positions = torch.arange(count, device=model.device)
    hidden = model.read_whole(embeddings.to(model.device, model.dtype), positions, batch)
    return torch.stack(batch.layers).float(), hidden
