"""Prompt tuning (Lester, Al-Rfou, Constant, EMNLP 2021, arXiv 2104.08691): the embeddings themselves are learned.

P' = P
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from promptd.training.checks import Positive
from promptd.training.methods.base import PromptMethod, group
from promptd.training.methods.config import MethodConfig


@dataclass(frozen=True, slots=True)
class PromptTuningConfig(MethodConfig):
    """Settings of prompt tuning."""

    name: ClassVar[str] = "prompt_tuning"

    learning_rate: Positive = 0.3


class PromptTuning(PromptMethod):
    """P' = P."""

    config_class = PromptTuningConfig
    config: PromptTuningConfig

    def __init__(
        self, config: PromptTuningConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        self.prompt = nn.Parameter(start.clone())  # [num_virtual_tokens, hidden_size]

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return self.prompt

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group at embedding scale."""
        return [group([self.prompt], self.config.learning_rate * self.embedding_std)]
