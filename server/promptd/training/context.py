"""What a learned prompt stands behind: stored prompts or a text, as keys and values that never change.

A chain runs here as it runs when it is served: soft prompts and texts go through the model behind what stands before
them, prefixes are copied, and each moves the positions of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from promptd_store import PromptArtifact, PromptKind

from promptd.modeling import FrozenModel
from promptd.training.forward import prompt_key_values

CHUNK_TOKENS = 256
"""Tokens that run through the model at once: a document of thousands must not need memory for all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceContext:
    """What a chain puts in front of a text that is read whole."""

    front: torch.Tensor
    """`[n, hidden_size]`: embeddings that stand in it, soft prompts and texts."""
    behind_first: bool
    """Whether they, and all that joins them, stand behind the text's first token (of `Family.first_ids`)."""
    key_values: torch.Tensor
    """`[num_encoder_layers, 2, num_kv_heads, num_tokens, head_dim]`: what the source's own attention reads."""
    cross: torch.Tensor
    """`[num_layers, 2, num_kv_heads, num_tokens, head_dim]`: what cross attention reads beside it."""
    num_positions: int
    """Position of the text's first token."""
    target_front: torch.Tensor
    """`[n, hidden_size]`: embeddings that stand in front of the target's own tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class FrozenContext:
    """Keys and values for a whole chain, computed once, without autograd."""

    key_values: torch.Tensor
    """`[num_layers, 2, num_kv_heads, num_tokens, head_dim]`, in the model's dtype and on its device."""
    num_positions: int
    """Position of what follows; an unshifted prefix has tokens but moves nothing."""
    source: SourceContext | None = None
    """What the text reads where it is no target."""

    @classmethod
    def empty(cls, model: FrozenModel) -> Self:
        """Return a context without tokens."""
        spec = model.spec
        shape = (spec.num_layers, 2, spec.num_kv_heads, 0, spec.head_dim)
        return cls(torch.empty(shape, dtype=model.dtype, device=model.device), 0)

    @property
    def num_tokens(self) -> int:
        """Keys that everything behind it sees."""
        if self.source is None:
            return self.key_values.shape[3]
        sides = (
            self.key_values.shape[3] + len(self.source.target_front),
            self.source.key_values.shape[3] + len(self.source.front),
        )
        return max(sides)


def chain_context(model: FrozenModel, prompts: Sequence[PromptArtifact]) -> FrozenContext:
    """Return what a chain of stored prompts is to whatever follows it."""
    if model.has_sources:
        return _source_chain(model, prompts)
    context = FrozenContext.empty(model)
    if model.bos_token_id is not None and model.begins_after_bos(prompts):
        context = text_context(model, [model.bos_token_id])
    for artifact in prompts:
        manifest = artifact.manifest
        if artifact.kind is PromptKind.TEXT:
            context = text_context(model, model.text_ids.of(manifest.text or ""), context)
        elif artifact.kind is PromptKind.SOFT:
            context = _run_behind(model, context, artifact.tensors["prompt_embeddings"])
        else:
            context = _followed_by(context, artifact.tensors["prefix"], _num_positions(artifact))
    return context


def _source_chain(model: FrozenModel, prompts: Sequence[PromptArtifact]) -> FrozenContext:
    """Soft prompts and texts stand in the source, one behind the other; each bank of prefixes has its own place."""
    context, sizes = FrozenContext.empty(model), model.family.sizes
    embeds = [model.embed(torch.zeros(0, dtype=torch.int64, device=model.device))]
    of_targets = list(embeds)
    shape = (sizes.num_encoder_layers or sizes.num_layers, *context.key_values.shape[1:])
    whole = {"source": context.key_values.new_empty(shape), "cross": context.key_values}
    num_positions = 0
    for artifact in prompts:
        if artifact.kind is PromptKind.TEXT:
            ids = model.text_ids.of(artifact.manifest.text or "")
            embeds.append(model.embed(torch.tensor(ids, dtype=torch.int64, device=model.device)))
        elif artifact.kind is PromptKind.SOFT:
            embeds.append(artifact.learned.to(context.key_values))
            if artifact.target_embeddings is not None:
                of_targets.append(artifact.target_embeddings.to(context.key_values))
        else:
            banks, moved = model.split_prefix(artifact.tensors["prefix"]), _num_positions(artifact)
            if "target" in banks:
                context = _followed_by(context, banks["target"], moved)
            for name in whole.keys() & banks.keys():
                whole[name] = torch.cat([whole[name], banks[name].to(whole[name])], dim=3)
            num_positions += moved * ("source" in banks)
    standing = [artifact for artifact in prompts if artifact.kind is not PromptKind.PREFIX]
    behind_first = standing[0].manifest.prompt_after_bos if standing else model.family.learns_behind_first
    front = torch.cat(embeds).detach()
    target_front = torch.cat(of_targets).detach()
    source = SourceContext(front, behind_first, whole["source"], whole["cross"], num_positions, target_front)
    return replace(context, source=source)


def _num_positions(artifact: PromptArtifact) -> int:
    """Return how far a prefix moves what follows."""
    is_shifted = artifact.manifest.position_convention == "shifted"
    return artifact.num_virtual_tokens if is_shifted else 0


def text_context(model: FrozenModel, token_ids: Sequence[int], behind: FrozenContext | None = None) -> FrozenContext:
    """Return a text, behind what may stand before it."""
    embeddings = model.embed(torch.tensor(token_ids, device=model.device)).detach()
    return _run_behind(model, behind or FrozenContext.empty(model), embeddings)


@torch.no_grad()
def _run_behind(model: FrozenModel, context: FrozenContext, embeddings: torch.Tensor) -> FrozenContext:
    for chunk in embeddings.split(CHUNK_TOKENS):
        context = _followed_by(context, prompt_key_values(model, chunk, context), len(chunk))
    return context


def _followed_by(context: FrozenContext, key_values: torch.Tensor, num_positions: int) -> FrozenContext:
    joined = torch.cat([context.key_values, key_values.to(context.key_values)], dim=3)
    return FrozenContext(joined, context.num_positions + num_positions)
