"""What a soft prompt looks like in words: the vocabulary rows nearest to each of its vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from promptd_store import PromptArtifact, PromptKind

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel

_CHUNK_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Neighbor:
    """One vocabulary entry and its cosine similarity to a prompt vector."""

    token_id: int
    token: str
    cosine: float


@torch.no_grad()
def neighbors(model: FrozenModel, artifact: PromptArtifact, count: int) -> list[list[Neighbor]]:
    """Return the `count` nearest entries of each virtual token, best first (Lester et al. 2021, section 7)."""
    if artifact.kind is not PromptKind.SOFT:
        raise InvalidRequestError(f"only soft prompts live among the embeddings, this is a {artifact.kind.value}")
    vectors = torch.nn.functional.normalize(artifact.tensors["prompt_embeddings"].float().to(model.device), dim=-1)
    similar = []
    for ids in torch.arange(model.spec.vocab_size, device=model.device).split(_CHUNK_ROWS):
        rows = torch.nn.functional.normalize(model.embed(ids).float(), dim=-1)
        similar.append(vectors @ rows.T)
    best = torch.cat(similar, 1).topk(count)
    return [
        [
            Neighbor(token_id, model.decode([token_id], skip_special_tokens=False), round(value, 6))
            for token_id, value in zip(ids, values, strict=True)
        ]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
