"""Residual Prompt Tuning (Razdaibiedina et al., Findings of ACL 2023, arXiv 2305.03937).

    P'_i = P_i + LayerNorm(dropout(W_up f(W_down P_i + b_down) + b_up))          section 3 of the paper

One network is shared by all virtual tokens, or each has its own (section 5.6), both linear layers have a bias, the
LayerNorm is the last step of the branch, before the skip, f is a ReLU unless another is chosen, and everything starts
from torch's default initialisation. After training P' is computed once and the network is dropped.

The authors' recipe is tied to T5, whose embeddings have a standard deviation of the order of 1 to 40; GPT-2's
have 0.02. There a LayerNorm with gain 1 makes the branch fifty times the prompt it is added to, and W_down P drowns in
b_down, so that all virtual tokens get the same branch. Hence everything here is the authors' in units of the standard
deviation s of the base model's embedding output: W_down starts at 1/s times its default and learns at 1/s times
the rate; what sets the size of the branch (the LayerNorm, or W_up and b_up where there is none) starts at s times its
default, and it and P learn at s times the rate. With s = 1 nothing changes (the paper's section 3.2 has the LayerNorm,
5.2 the learning rates; the scaling is ours). The linear layers have a rate of their own, as an option of the authors'
code has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from promptd.training.checks import Positive, Share, Size
from promptd.training.methods.base import PromptMethod, group, linear_parameter
from promptd.training.methods.config import MethodConfig

MAX_DEFAULT_BOTTLENECK_SIZE = 800

Nonlinearity = Literal["relu", "tanh", "gelu", "sigmoid"]

_NONLINEARITIES: Mapping[Nonlinearity, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": gelu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class ResidualConfig(MethodConfig):
    """Settings of residual prompt tuning."""

    name: ClassVar[str] = "residual"

    learning_rate: Positive = 1.0
    network_learning_rate: Positive = 3e-4
    """For the linear layers."""
    bottleneck_size: Size | None = None
    """Width inside the network (None: min(800, hidden_size))."""
    separate_networks: bool = False
    """True: a network for each virtual token, better on more data; False: one for all, better on little."""
    layer_norm: bool = True
    nonlinearity: Nonlinearity = "relu"
    dropout: Share = 0.0


class ResidualPromptTuning(PromptMethod):
    """P' = P + LayerNorm(W_up f(W_down P)); the weights' first dimension counts networks: one or one a token."""

    config_class = ResidualConfig
    config: ResidualConfig

    def __init__(
        self, config: ResidualConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        num_tokens, hidden = start.shape
        num = num_tokens if config.separate_networks else 1
        size = config.bottleneck_size or min(MAX_DEFAULT_BOTTLENECK_SIZE, hidden)
        self.prompt = nn.Parameter(start.clone())  # [num_virtual_tokens, hidden_size]
        self.down_weight = linear_parameter((num, hidden, size), hidden, generator, 1 / embedding_std)
        self.down_bias = linear_parameter((num, 1, size), hidden, generator)
        self.up_weight = linear_parameter((num, size, hidden), size, generator, self._up_scale)
        self.up_bias = linear_parameter((num, 1, hidden), size, generator, self._up_scale)
        self.gain = nn.Parameter(torch.full((num, 1, hidden), embedding_std)) if config.layer_norm else None
        self.shift = nn.Parameter(torch.zeros(num, 1, hidden)) if config.layer_norm else None

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return self.prompt + self.branch()

    def branch(self) -> torch.Tensor:
        """Return what is added to the prompt, `[num_virtual_tokens, hidden_size]`."""
        tokens = self.prompt.view(len(self.down_weight), -1, self.prompt.shape[1])  # [num_networks, tokens of each, d]
        inside = _NONLINEARITIES[self.config.nonlinearity](torch.baddbmm(self.down_bias, tokens, self.down_weight))
        branch = self.dropped(torch.baddbmm(self.up_bias, inside, self.up_weight), self.config.dropout)
        if self.gain is not None and self.shift is not None:
            branch = layer_norm(branch, branch.shape[-1:]) * self.gain + self.shift
        return branch.view_as(self.prompt)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return prompt and LayerNorm at embedding scale, W_down at its inverse, W_up at the scale of what it makes."""
        rate, network_rate = self.config.learning_rate, self.config.network_learning_rate
        norm = [part for part in (self.gain, self.shift) if part is not None]
        return [
            group([self.prompt, *norm], rate * self.embedding_std),
            group([self.down_weight], network_rate / self.embedding_std),
            group([self.down_bias], network_rate),
            group([self.up_weight, self.up_bias], network_rate * self._up_scale),
        ]

    @property
    def _up_scale(self) -> float:
        """Size of W_up's output: a LayerNorm takes any, without one it is the branch."""
        return 1.0 if self.config.layer_norm else self.embedding_std
