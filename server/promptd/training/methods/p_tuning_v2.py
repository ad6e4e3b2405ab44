"""P-tuning v2 (Liu et al., ACL 2022, arXiv 2110.07602): keys and values of every layer are the parameters.

    [K; V] = scale * dropout(P)

Also prefix-tuning's ablation without a network (Li & Liang 2021, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from promptd.training.checks import Positive
from promptd.training.methods.base import group
from promptd.training.methods.prefix import Prefix, PrefixConfig


@dataclass(frozen=True, slots=True)
class PTuningV2Config(PrefixConfig):
    """Settings of P-tuning v2."""

    name: ClassVar[str] = "p_tuning_v2"

    learning_rate: Positive = 0.1


class PTuningV2(Prefix):
    """Keys and values are the parameters."""

    config_class = PTuningV2Config
    config: PTuningV2Config

    def __init__(
        self, config: PTuningV2Config, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        self.key_values = nn.Parameter(start / self.scale)

    def normalized(self) -> torch.Tensor:
        """Return the parameters."""
        return self.key_values

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group: the parameters have unit scale."""
        return [group([self.key_values], self.config.learning_rate)]
