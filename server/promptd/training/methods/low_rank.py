"""Decomposed Prompt Tuning (Xiao et al., Findings of EMNLP 2023, arXiv 2310.10094): a prompt of low rank.

    P = A B          A: [num_virtual_tokens, rank], B: [rank, hidden_size], both learned

The start is the best approximation of the initial prompt that the rank allows (its truncated singular value
decomposition, ours), with A at unit scale and B at that of the embeddings. A and B learn at
rates under which a step moves an entry of P about as far as in prompt tuning (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from promptd.errors import InvalidRequestError
from promptd.training.checks import Count, Positive
from promptd.training.methods.base import PromptMethod, group
from promptd.training.methods.config import MethodConfig


@dataclass(frozen=True, slots=True)
class LowRankConfig(MethodConfig):
    """Settings of a low-rank prompt."""

    name: ClassVar[str] = "low_rank"

    learning_rate: Positive = 0.3
    rank: Count = 4
    """At most num_virtual_tokens; the authors have 10 for 100."""

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.rank > self.num_virtual_tokens:
            message = f"rank must be at most num_virtual_tokens = {self.num_virtual_tokens}, got {self.rank}"
            raise InvalidRequestError(message, param="rank")


class LowRankPrompt(PromptMethod):
    """P = A B."""

    config_class = LowRankConfig
    config: LowRankConfig

    def __init__(
        self, config: LowRankConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        if config.rank > start.shape[1]:
            message = f"rank must be at most the model's hidden size of {start.shape[1]}, got {config.rank}"
            raise InvalidRequestError(message, param="rank")
        left, singular, right = torch.linalg.svd(start, full_matrices=False)
        unit = start.shape[0] ** 0.5  # columns of `left` have length 1: times this, their entries are about 1
        self.left = nn.Parameter(left[:, : config.rank] * unit)
        self.right = nn.Parameter(singular[: config.rank, None] * right[: config.rank] / unit)

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return self.left @ self.right

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return A at unit scale and B at embedding scale, whose steps add up over the rank."""
        rate = self.config.learning_rate
        return [
            group([self.left], rate),
            group([self.right], rate * self.embedding_std / self.config.rank**0.5),
        ]
