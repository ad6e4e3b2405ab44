"""What a learned prompt stands behind: stored prompts or a text, as keys and values that never change.

A chain runs here as it runs when it is served: soft prompts and texts go through the model behind what stands before
them, prefixes are copied, and each moves the positions of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from promptd_store import PromptArtifact, PromptKind

from promptd.modeling import FrozenModel
from promptd.training.forward import prompt_key_values

CHUNK_TOKENS = 256
"""Tokens that run through the model at once: a document of thousands must not need memory for all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class FrozenContext:
    """Keys and values for a whole chain, computed once, without autograd."""

    key_values: torch.Tensor
    """`[num_layers, 2, num_kv_heads, num_tokens, head_dim]`, in the model's dtype and on its device."""
    num_positions: int
    """Position of what follows; an unshifted prefix has tokens but moves nothing."""

    @classmethod
    def empty(cls, model: FrozenModel) -> Self:
        """Return a context without tokens."""
        spec = model.spec
        shape = (spec.num_layers, 2, spec.num_kv_heads, 0, spec.head_dim)
        return cls(torch.empty(shape, dtype=model.dtype, device=model.device), 0)

    @property
    def num_tokens(self) -> int:
        """Keys that everything behind it sees."""
        return self.key_values.shape[3]


def chain_context(model: FrozenModel, prompts: Sequence[PromptArtifact]) -> FrozenContext:
    """Return what a chain of stored prompts is to whatever follows it."""
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
            prefix = artifact.tensors["prefix"]
            moved = prefix.shape[3] if manifest.position_convention == "shifted" else 0
            context = _followed_by(context, prefix, moved)
    return context


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
