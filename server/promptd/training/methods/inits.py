"""Where a prompt starts: rows of the vocabulary, words of a text, class labels, or noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from promptd.modeling import FrozenModel

NUM_FREQUENT_TOKENS = 5000
"""Vocabulary rows that are sampled: the first, most frequent ones (Lester et al.)."""
_CHUNK = 4096


@torch.no_grad()
def embedding_std(model: FrozenModel) -> float:
    """Return the standard deviation of the embedding output over the whole vocabulary."""
    total, squares, count = 0.0, 0.0, 0
    for ids in torch.arange(model.spec.vocab_size, device=model.device).split(_CHUNK):
        rows = model.embed(ids).double()
        total, squares, count = total + rows.sum().item(), squares + rows.square().sum().item(), count + rows.numel()
    return float((squares / count - (total / count) ** 2) ** 0.5)


@torch.no_grad()
def sampled_vocabulary(model: FrozenModel, num_virtual_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return embeddings of random frequent tokens, `[num_virtual_tokens, hidden_size]`, each once if possible."""
    pool = min(NUM_FREQUENT_TOKENS, model.spec.vocab_size)
    order = torch.randperm(pool, generator=generator)
    ids = order.repeat(-(-num_virtual_tokens // pool))[:num_virtual_tokens]
    return model.embed(ids.to(model.device)).float()


def random_uniform(model: FrozenModel, num_virtual_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return uniform noise with the standard deviation of the embeddings, `[num_virtual_tokens, hidden_size]`."""
    noise = torch.rand(num_virtual_tokens, model.spec.hidden_size, generator=generator) * 2 - 1
    return noise.to(model.device) * (3**0.5 * embedding_std(model))


@torch.no_grad()
def class_labels(
    model: FrozenModel, words: Sequence[str], num_virtual_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the mean embedding of each label's tokens in turn, then sampled vocabulary."""
    prompt = sampled_vocabulary(model, num_virtual_tokens, generator)
    for slot, word in enumerate(words[:num_virtual_tokens]):
        ids = torch.tensor(model.encode(word, add_special_tokens=False), device=model.device)
        prompt[slot] = model.embed(ids).float().mean(0)
    return prompt


@torch.no_grad()
def from_text(model: FrozenModel, text: str, num_virtual_tokens: int) -> torch.Tensor:
    """Return the embeddings of a text's tokens, repeated or cut to `num_virtual_tokens`."""
    ids = model.encode(text, add_special_tokens=False)
    repeated = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    return model.embed(torch.tensor(repeated, device=model.device)).float()
