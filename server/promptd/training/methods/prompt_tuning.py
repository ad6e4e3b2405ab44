"""Prompt tuning (Lester, Al-Rfou, Constant 2021): the virtual tokens' embeddings themselves are learned."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from promptd_store import PromptKind
from torch import nn

from promptd.training.methods.base import PromptMethod, group


class PromptTuning(PromptMethod):
    """P' = P."""

    name: ClassVar[str] = "prompt_tuning"
    kind: ClassVar[PromptKind] = PromptKind.SOFT

    def __init__(self, initial: torch.Tensor, embedding_std: float) -> None:
        super().__init__(embedding_std)
        self.prompt = nn.Parameter(initial.detach().float().clone())  # [num_virtual_tokens, hidden_size]

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return self.prompt

    def parameter_groups(self, learning_rate: float, network_learning_rate: float) -> list[dict[str, Any]]:
        """Return one group at embedding scale."""
        return [group([self.prompt], learning_rate * self.embedding_std)]

    @property
    def stored_params(self) -> int:
        """The same numbers as are learned."""
        return self.prompt.numel()
