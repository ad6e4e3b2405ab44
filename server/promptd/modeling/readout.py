"""What is read off a source's hidden states: classes, an embedding, or the words at a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Reading:
    """What a request wants of its text."""

    kind: Literal["classes", "embedding", "words"]
    candidates: tuple[tuple[int, ...], ...] = ()
    """For words: each one's tokens."""


class Readout(Protocol):
    """Turns the hidden states of one source, `[num_tokens, hidden_size]`, into the numbers of its answer, `[n]`."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Read one source."""


@dataclass(frozen=True, slots=True)
class ClassReadout:
    """The scores (logits) of a classification head, which looks at the row's first token."""

    head: Callable[[torch.Tensor], torch.Tensor]
    """`[1, hidden_size]` to `[1, num_classes]`."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a logit for every class."""
        return self.head(hidden[:1])[0]


@dataclass(frozen=True, slots=True)
class WordReadout:
    """The log-probability (nats) of each word at the text's mask."""

    predict: Callable[[torch.Tensor], torch.Tensor]
    """`[1, hidden_size]` to `[1, vocab_size]`."""
    position: int
    token_ids: tuple[int, ...]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a log-probability for every word."""
        logits = self.predict(hidden[self.position : self.position + 1])[0].float()
        return logits.log_softmax(-1)[list(self.token_ids)]


@dataclass(frozen=True, slots=True)
class EmbeddingReadout:
    """The sentence's embedding: the mean over its text tokens (soft prompts are no text), or its first one's state."""

    tokens: tuple[int, ...]
    """Places of the text's tokens in the row."""
    pooling: Literal["mean", "cls"]
    is_normalized: bool

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the vector."""
        text = hidden[list(self.tokens)].float()
        pooled = text.mean(0) if self.pooling == "mean" else text[0]
        return torch.nn.functional.normalize(pooled, dim=0) if self.is_normalized else pooled
