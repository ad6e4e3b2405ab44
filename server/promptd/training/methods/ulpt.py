"""Ultra-Low-Dimensional Prompt Tuning (Wu, Hao, Mou, EACL 2026, arXiv 2502.04501): a few numbers, randomly projected.

    P_i = (z_i P~) * s + b          z: [num_virtual_tokens, num_dims]; P~: [num_dims, hidden_size]; s, b: [hidden_size]

P~ is standard normal noise that is never trained: it follows from `projection_seed`, which is part of the method's
settings and not the job's seed, and is not stored. Learned are z, s and b: n r + 2 d numbers. s starts at the
embeddings' standard deviation, b at the initial prompt's mean, and z where P comes closest to the initial prompt
(least squares, ours): unless num_dims reaches hidden_size, that is an approximation. Rates are such that a step moves
an entry of P about as far as in prompt tuning (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from promptd.training.checks import Natural, Positive, Size
from promptd.training.methods.base import PromptMethod, group
from promptd.training.methods.config import MethodConfig


@dataclass(frozen=True, slots=True)
class UlptConfig(MethodConfig):
    """Settings of ultra-low-dimensional prompt tuning."""

    name: ClassVar[str] = "ulpt"

    learning_rate: Positive = 0.3
    num_dims: Size = 64
    """Numbers learned per virtual token."""
    projection_seed: Natural = 0


class UltraLowPromptTuning(PromptMethod):
    """P = (z P~) * s + b."""

    config_class = UlptConfig
    config: UlptConfig

    projection: torch.Tensor  # P~, [num_dims, hidden_size]

    def __init__(
        self, config: UlptConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        seeded = torch.Generator().manual_seed(config.projection_seed)
        projection = torch.randn(config.num_dims, start.shape[1], generator=seeded)
        self.register_buffer("projection", projection, persistent=False)
        self.offset = nn.Parameter(start.mean(0))  # b, [hidden_size]
        self.scale = nn.Parameter(torch.full_like(start[0], embedding_std))  # s, [hidden_size]
        target = (start - start.mean(0)) / embedding_std
        self.dims = nn.Parameter(torch.linalg.lstsq(projection.T, target.T, driver="gelsd").solution.T.contiguous())

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return self.dims @ self.projection * self.scale + self.offset

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return z, whose steps add up over its numbers, and s and b at embedding scale."""
        rate = self.config.learning_rate
        return [
            group([self.dims], rate / self.config.num_dims**0.5),
            group([self.scale, self.offset], rate * self.embedding_std),
        ]
