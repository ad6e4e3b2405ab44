"""Texts of many prompts as one stack of the model reads them: packed rows with embeddings in them, keys in front.

In front of a source a prompt's keys depend on the text, so a soft prompt stands in every one of its texts, and the
gradients of all of them meet in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from promptd.training.forward import GroupedBatch, PromptedTexts
from promptd.training.padded_rows import padded_runs

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel


@dataclass(frozen=True, slots=True)
class Side:
    """What one stack reads of a group."""

    texts: Sequence[Sequence[int]]
    given: Sequence[torch.Tensor] = ()
    """Keys and values in front of every text, each like a prefix of this stack's layers."""
    softs: Sequence[torch.Tensor] = ()
    """Embeddings `[n, hidden_size]` that stand in every text, one behind the other."""
    offsets: Sequence[int] = ()
    """For each text how many of its own tokens stand before them; empty for none."""
    first_position: int = 0


def source_side(model: FrozenModel, group: PromptedTexts) -> Side:
    """Return what is read whole of a group: its sources, behind what its context and its prompt put in front."""
    before = None if group.context is None else group.context.source
    softs, given, first = [], [], 0
    behind_first = model.family.learns_behind_first
    if before is not None:
        softs, given, first = [before.front], [before.key_values], before.num_positions
        behind_first = before.behind_first
    if group.soft is not None:
        softs.append(group.soft)
    bank = bank_of(model, group, "source")
    if bank is not None:
        given.append(bank)
        first += bank.shape[3]
    begins = model.family.first_ids
    offsets = [int(behind_first and text[0] in begins) for text in group.sources]
    return Side(group.sources, given, softs, offsets, first)


def bank_of(model: FrozenModel, group: PromptedTexts, name: str) -> torch.Tensor | None:
    """Return one bank of a group's prefix; None where it has none."""
    return None if group.prefix is None else model.split_prefix(group.prefix).get(name)


@dataclass(slots=True)
class PackedTexts:
    """The texts of all sides end to end."""

    embeds: torch.Tensor
    """`[num_tokens, hidden_size]`, with autograd to the soft prompts."""
    positions: torch.Tensor
    """`[num_tokens]`, int64."""
    lengths: list[int] = field(default_factory=list)
    """Of each row, soft prompts and all."""
    places: list[torch.Tensor] = field(default_factory=list)
    """For each side: where its texts' own tokens are, `[num_text_tokens]` int64."""

    @property
    def starts(self) -> list[int]:
        """Where each row begins."""
        lengths = torch.tensor(self.lengths)
        starts: list[int] = (lengths.cumsum(0) - lengths).tolist()
        return starts


def pack(model: FrozenModel, sides: Sequence[Side]) -> PackedTexts:
    """Embed and lay out all rows."""
    device = model.device
    embedded = model.embed(torch.tensor([token for side in sides for text in side.texts for token in text]).to(device))
    parts, positions, lengths, places, at, taken = [], [], [], [], 0, 0
    for side in sides:
        softs = [soft.to(embedded) for soft in side.softs]
        num_virtual, own = sum(map(len, softs)), []
        for text, offset in zip(side.texts, side.offsets or [0] * len(side.texts), strict=True):
            count, length = len(text), len(text) + num_virtual
            parts += [embedded[taken : taken + offset], *softs, embedded[taken + offset : taken + count]]
            positions.append(torch.arange(side.first_position, side.first_position + length))
            token = torch.arange(count)
            own.append(at + token + num_virtual * (token >= offset))
            lengths.append(length)
            at, taken = at + length, taken + count
        places.append(torch.cat(own))
    return PackedTexts(torch.cat(parts), torch.cat(positions).to(device), lengths, places)


class SideBatch(GroupedBatch):
    """Attention of one pass over sides: a token sees what is given, and of its row everything, or what came before."""

    def __init__(
        self,
        sides: Sequence[Side],
        lengths: Sequence[int],
        device: torch.device,
        between_layers: Callable[[], None] | None = None,
        *,
        is_causal: bool = False,
    ) -> None:
        """`lengths`: tokens of every row, soft prompts and all."""
        self._given = [one for side in sides for one in side.given]
        self._between_layers = between_layers
        contexts, next_given = [], sum(lengths)
        for side in sides:
            num_given = sum(one.shape[3] for one in side.given)
            contexts += [torch.arange(next_given, next_given + num_given)] * len(side.texts)
            next_given += num_given
        self._rows = padded_runs(lengths, contexts, device, is_causal=is_causal)
