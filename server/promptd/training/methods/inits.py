"""Where a prompt starts: rows of the vocabulary, words of a text, class labels, or noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel


@torch.no_grad()
def sampled_vocabulary(
    model: FrozenModel, count: int, generator: torch.Generator, vocabulary: int | None
) -> torch.Tensor:
    """Return embeddings of `count` random tokens among the first `vocabulary` (None: all), each once if possible.

    `[count, hidden_size]`, float32.
    """
    pool = min(vocabulary or model.spec.vocab_size, model.spec.vocab_size)
    order = torch.randperm(pool, generator=generator)
    ids = order.repeat(-(-count // pool))[:count]
    return model.embed(ids.to(model.device)).float()


def random_uniform(model: FrozenModel, num_virtual_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return uniform noise with the standard deviation of the embeddings, `[num_virtual_tokens, hidden_size]`."""
    noise = torch.rand(num_virtual_tokens, model.spec.hidden_size, generator=generator) * 2 - 1
    return noise.to(model.device) * (3**0.5 * model.embedding_std)


@torch.no_grad()
def class_labels(model: FrozenModel, words: Sequence[str], rest: torch.Tensor) -> torch.Tensor:
    """Return the mean embedding of each label word's tokens in turn, then what `rest` holds in the slots behind."""
    prompt = rest.clone()
    for slot, word in enumerate(words[: len(rest)]):
        prompt[slot] = _embedded(model, word, "label_words").mean(0)
    return prompt


@torch.no_grad()
def from_text(model: FrozenModel, text: str, num_virtual_tokens: int) -> torch.Tensor:
    """Return the embeddings of a text's tokens, repeated or cut to `num_virtual_tokens`."""
    words = _embedded(model, text, "init_text")
    return words.repeat(-(-num_virtual_tokens // len(words)), 1)[:num_virtual_tokens]


def fitted(prompt: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Return a soft prompt or prefix with as many virtual tokens as `fresh`: cut, or followed by `fresh`'s last ones.

    Both layouts have virtual tokens in the last dimension but one.
    """
    kept = prompt[..., : fresh.shape[-2], :]
    return torch.cat([kept, fresh[..., kept.shape[-2] :, :]], dim=-2)


def _embedded(model: FrozenModel, text: str, param: str) -> torch.Tensor:
    """Return a text's embeddings, at least one row, float32."""
    ids = model.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidRequestError(f"{param} must have tokens, got {text!r}", param=param)
    return model.embed(torch.tensor(ids, device=model.device)).float()
