"""What every way of learning a prompt has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from promptd_store import PromptKind
from torch import nn


class PromptMethod(nn.Module, ABC):
    """A reparameterization: trainable parameters that materialize as a prompt, always kept in float32.

    `embedding_std` is the standard deviation of the base model's embedding output. Parameters that live at that
    scale learn at `learning_rate * embedding_std`, so that one rate fits models whose embeddings differ in size by
    a factor of a thousand; parameters without a scale of their own learn at `network_learning_rate`.
    """

    name: ClassVar[str]
    kind: ClassVar[PromptKind]
    foldable: ClassVar[bool] = True
    """True where training-only parts collapse to a plain prompt that is served at no extra cost."""

    def __init__(self, embedding_std: float) -> None:
        super().__init__()
        self.embedding_std = embedding_std

    @abstractmethod
    def materialize(self) -> torch.Tensor:
        """Return the prompt with autograd: `[num_virtual_tokens, hidden_size]` or
        `[num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]`."""

    @abstractmethod
    def parameter_groups(self, learning_rate: float, network_learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with its own `lr`."""

    @property
    def trainable_params(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    @abstractmethod
    def stored_params(self) -> int:
        """How many numbers the folded prompt holds."""

    @torch.no_grad()
    def fold(self) -> torch.Tensor:
        """Return what `materialize` computes, as a plain tensor of its own (never a view of a live parameter)."""
        was_training = self.training
        self.eval()
        folded = self.materialize().detach().clone()
        self.train(was_training)
        return folded


def group(parameters: Iterable[torch.Tensor], rate: float) -> dict[str, Any]:
    """Return one optimizer group."""
    return {"params": list(parameters), "lr": rate}
