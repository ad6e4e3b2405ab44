"""The differentiable pass of a sequence-to-sequence model: sources read whole, then targets that read them.

A prompt's parts go where they go when it is served: a soft prompt into every source, and what of it is for targets in
front of these; a prefix in front of the target, the source and what cross attention reads. Gradients pass through both
stacks. A source is read once, however many targets go on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from promptd.training.forward import PromptedTexts, Recorded
from promptd.training.forward_sources import source_key_values
from promptd.training.padded_rows import padded_runs
from promptd.training.sides import Side, SideBatch, bank_of, pack, source_side

if TYPE_CHECKING:
    from promptd.modeling import FrozenModel, Site
    from promptd.training.methods.prefix import Banks


class TargetBatch(SideBatch):
    """Attention of targets: to what is given and themselves, causally, and to what is given of their sources."""

    def __init__(
        self,
        sides: Sequence[Side],
        lengths: Sequence[int],
        device: torch.device,
        between_layers: Callable[[], None] | None,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        given: Sequence[torch.Tensor],
        slots: Sequence[torch.Tensor],
    ) -> None:
        """`layers`: keys and values of all sources' tokens, `[1, num_kv_heads, num_tokens, head_dim]`; `given`: those
        of prefixes behind them; `slots`: for each row which of all these it reads."""
        super().__init__(sides, lengths, device, between_layers, is_causal=True)
        self._layers, self._cross_given = layers, given
        self._cross_rows = padded_runs(lengths, slots, device, is_causal=False, has_own=False)

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_tokens, num_heads, head_dim]`."""
        if not site.is_cross:
            return super().attend(site, query, key, value)
        given = [one[site.layer].to(query.dtype) for one in self._cross_given]  # [2, num_kv_heads, n, head_dim]
        keys, values = (
            torch.cat([own[0], *(one[which] for one in given)], dim=1).transpose(0, 1)
            for which, own in enumerate(self._layers[site.layer])
        )
        queries = query[0].transpose(0, 1)
        return torch.cat([rows.attend(site, queries, keys, values) for rows in self._cross_rows]).unsqueeze(0)


def forward_pairs(
    model: FrozenModel, groups: Sequence[PromptedTexts], *, between_layers: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """Run all groups in two passes, one for each stack; return each one's logits, `[num_logits, vocab_size]` in
    float32. `between_layers` is called as in `forward_groups`."""
    device = model.device
    sources = [source_side(model, group) for group in groups]
    read = pack(model, sources)
    batch = SideBatch(sources, read.lengths, device, between_layers)
    layers = list(model.cross_keys(model.read_whole(read.embeds, read.positions, batch)))
    targets = [_target_side(model, group) for group in groups]
    packed = pack(model, targets)
    given, slots = _what_targets_read(model, groups, read.starts, read.lengths)
    target_batch = TargetBatch(targets, packed.lengths, device, between_layers, layers, given, slots)
    index = [places[group.logits_index] for group, places in zip(groups, packed.places, strict=True)]
    logits = model.forward(packed.embeds, packed.positions, torch.cat(index).to(device), target_batch)
    return list(logits.float().split([len(own) for own in index]))


def _target_side(model: FrozenModel, group: PromptedTexts) -> Side:
    given, softs, first = [], [], 0
    if group.context is not None:
        given, first = [group.context.key_values], group.context.num_positions
        softs = [] if group.context.source is None else [group.context.source.target_front]
    if group.target_soft is not None:
        softs.append(group.target_soft)
    bank = bank_of(model, group, "target")
    if bank is not None:
        given.append(bank)
        first += bank.shape[3]
    return Side(group.texts, given, softs, first_position=first)


def _what_targets_read(
    model: FrozenModel, groups: Sequence[PromptedTexts], starts: Sequence[int], lengths: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what prefixes add to cross attention, and for each target the slots that it reads: those, its source."""
    given: list[torch.Tensor] = []
    slots, at, next_given = [], 0, sum(lengths)
    for group in groups:
        before = None if group.context is None else group.context.source
        own = [] if before is None else [before.cross]
        bank = bank_of(model, group, "cross")
        own += [] if bank is None else [bank]
        count = sum(one.shape[3] for one in own)
        learned = torch.arange(next_given, next_given + count)
        given, next_given = given + own, next_given + count
        for number in range(len(group.texts)):
            source = at + number % len(group.sources)
            slots.append(torch.cat([learned, torch.arange(starts[source], starts[source] + lengths[source])]))
        at += len(group.sources)
    return given, slots


def pair_key_values(model: FrozenModel, embeddings: torch.Tensor, banks: Banks) -> torch.Tensor:
    """Return the prefix that a text's embeddings `[n, hidden_size]` become as a source, and as the target that reads
    it: `[num_layers of the banks, 2, num_kv_heads, n, head_dim]`, the target's own first."""
    count, device = len(embeddings), model.device
    source, hidden = source_key_values(model, embeddings)
    layers = list(model.cross_keys(hidden))
    side, slots = Side([range(count)]), [torch.arange(count)]
    batch = Recorded(TargetBatch([side], [count], device, None, layers, [], slots))
    positions = torch.arange(count, device=device)
    model.forward(embeddings.to(device, model.dtype), positions, positions[:1], batch)
    target = torch.stack(batch.layers).float()
    if banks == "decoder":
        return target
    cross = torch.stack([torch.cat([key, value]) for key, value in layers]).float()
    return torch.cat([target, source, cross])
