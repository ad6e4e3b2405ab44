"""What every way of learning a prompt has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from promptd_store import PromptKind
from torch import nn

from promptd.modeling import FrozenModel
from promptd.training.methods.config import MethodConfig


class PromptMethod(nn.Module, ABC):
    """A reparameterization: trainable parameters that materialize as a prompt, always kept in float32.

    `embedding_std` is the standard deviation of the base model's embedding output. Parameters that live at that
    scale learn at `learning_rate * embedding_std`, so that one rate fits models whose embeddings differ in size by
    a factor of a thousand; parameters without a scale of their own learn at their method's other rates.

    All random draws, at the start and in training, come from the method's own `generator` (on the CPU, so that they
    are the same on every device): methods that share a forward pass do not notice each other, and a method whose
    parameters and `rng_state` are restored goes on as if it had never stopped.
    """

    config_class: ClassVar[type[MethodConfig]]
    config: MethodConfig
    kind: ClassVar[PromptKind] = PromptKind.SOFT
    foldable: ClassVar[bool] = True
    """True where training-only parts collapse to a plain prompt that is served at no extra cost."""

    def __init__(
        self, config: MethodConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        """`start` is the prompt to begin with, in the layout of `materialize`, float32 on the CPU."""
        super().__init__()
        self.config = config
        self.embedding_std = embedding_std
        self.generator = generator

    @classmethod
    def build(cls, config: MethodConfig, model: FrozenModel, start: torch.Tensor, generator: torch.Generator) -> Self:
        """Return the method on the CPU, beginning with `start`, in the layout of `materialize`."""
        return cls(config, start, model.embedding_std, generator)

    @abstractmethod
    def materialize(self) -> torch.Tensor:
        """Return the prompt with autograd: `[num_virtual_tokens, hidden_size]` or
        `[num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]`."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with its own `lr`; together they hold every parameter."""

    @property
    def trainable_params(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters())

    @property
    def stored_params(self) -> int:
        """How many numbers the folded prompt holds."""
        return self.fold().numel()

    @torch.no_grad()
    def fold(self) -> torch.Tensor:
        """Return what `materialize` computes without dropout, as a tensor of its own: never a view of a parameter."""
        was_training = self.training
        self.eval()
        folded = self.materialize().detach().clone(memory_format=torch.contiguous_format)
        self.train(was_training)
        return folded

    def rng_state(self) -> torch.Tensor:
        """Return the state of the method's generator, `[num_bytes]`, uint8."""
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Continue the random draws where `rng_state` was taken."""
        self.generator.set_state(state)

    def dropped(self, values: torch.Tensor, dropout: float) -> torch.Tensor:
        """Return the values with dropout in training mode, and as they are otherwise."""
        if not self.training or dropout == 0:
            return values
        kept = torch.rand(values.shape, generator=self.generator) >= dropout
        return values * kept.to(values.device) / (1 - dropout)


def group(parameters: Iterable[torch.Tensor], rate: float) -> dict[str, Any]:
    """Return one optimizer group."""
    return {"params": list(parameters), "lr": rate}


def linear_parameter(
    shape: Sequence[int], num_inputs: int, generator: torch.Generator, scale: float = 1.0
) -> nn.Parameter:
    """Return a linear layer's weight or bias as torch starts it, uniform within 1 / sqrt(num_inputs), times scale."""
    noise = torch.rand(*shape, generator=generator) * 2 - 1
    return nn.Parameter(noise * (scale / num_inputs**0.5))
