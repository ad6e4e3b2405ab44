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
    """Return the `count` nearest entries of each virtual token, best first (Lester et al. 2021, section 7).

    Raises `InvalidRequestError` for a prompt that has no vectors among the embeddings.
    """
    if artifact.kind is not PromptKind.SOFT:
        raise InvalidRequestError(f"only soft prompts live among the embeddings, this is a {artifact.kind.value}")
    vectors = torch.nn.functional.normalize(artifact.tensors["prompt_embeddings"].float().to(model.device), dim=-1)
    best_ids = torch.empty(len(vectors), 0, dtype=torch.int64, device=model.device)
    best_values = torch.empty(len(vectors), 0, device=model.device)
    for ids in torch.arange(model.spec.vocab_size, device=model.device).split(_CHUNK_ROWS):
        rows = torch.nn.functional.normalize(model.embed(ids).float(), dim=-1)
        values = torch.cat([best_values, vectors @ rows.T], 1)  # the best so far, and these
        found = torch.cat([best_ids, ids.expand(len(vectors), -1)], 1)
        best_values, at = values.topk(min(count, values.shape[1]))
        best_ids = found.gather(1, at)
    return [
        [
            Neighbor(token_id, model.decode([token_id], skip_special_tokens=False), round(value, 6))
            for token_id, value in zip(ids, values, strict=True)
        ]
        for ids, values in zip(best_ids.tolist(), best_values.tolist(), strict=True)
    ]
