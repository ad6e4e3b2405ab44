"""Prefix-tuning (Li & Liang, ACL 2021, arXiv 2101.00190): a network makes the keys and values of every layer.

    [K; V] = scale * dropout(W_outer tanh(W_inner E + b_inner) + b_outer)          section 4.3

E holds one embedding of the network's width per virtual token (the paper's P', of dimension k). The start is the
activations of real words: the last layer is solved for them by least squares, which reaches exactly what the authors'
500 steps of regression approach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from promptd.training.checks import Positive, Size
from promptd.training.methods.base import group, linear_parameter
from promptd.training.methods.prefix import Prefix, PrefixConfig


@dataclass(frozen=True, slots=True)
class PrefixTuningConfig(PrefixConfig):
    """Settings of prefix-tuning."""

    name: ClassVar[str] = "prefix_tuning"

    learning_rate: Positive = 0.1
    network_learning_rate: Positive = 1e-3
    """For the linear layers."""
    network_size: Size = 512
    """Width of the embeddings and inside the network."""


class PrefixTuning(Prefix):
    """Keys and values come out of one tanh network over an embedding per virtual token."""

    config_class = PrefixTuningConfig
    config: PrefixTuningConfig

    def __init__(
        self, config: PrefixTuningConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        num_layers, _, num_heads, num_tokens, head_dim = start.shape
        size, num_outputs = config.network_size, num_layers * 2 * num_heads * head_dim
        # Noise of unit scale, as the authors' embedding: rows must differ to reach any activations.
        self.embedding = nn.Parameter(torch.randn(num_tokens, size, generator=generator))
        self.inner_weight = linear_parameter((size, size), size, generator)
        self.inner_bias = linear_parameter((size,), size, generator)
        self.outer_weight = linear_parameter((num_outputs, size), size, generator)
        self.outer_bias = linear_parameter((num_outputs,), size, generator)
        target = (start / self.scale).permute(3, 0, 1, 2, 4).reshape(num_tokens, -1)
        with torch.no_grad():
            features = self._features()
            missing = target - linear(features, self.outer_weight, self.outer_bias)
            self.outer_weight.add_(torch.linalg.lstsq(features, missing, driver="gelsd").solution.T)

    def normalized(self) -> torch.Tensor:
        """Return the network's output in the prefix's layout."""
        num_layers, _, num_heads, num_tokens, head_dim = self.shape
        flat = linear(self._features(), self.outer_weight, self.outer_bias)
        return flat.view(num_tokens, num_layers, 2, num_heads, head_dim).permute(1, 2, 3, 0, 4)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the embedding at unit scale and the network at its own rate."""
        network = [self.inner_weight, self.inner_bias, self.outer_weight, self.outer_bias]
        return [
            group([self.embedding], self.config.learning_rate),
            group(network, self.config.network_learning_rate),
        ]

    def _features(self) -> torch.Tensor:
        """Return the layer before the last, `[num_virtual_tokens, network_size]`."""
        return torch.tanh(linear(self.embedding, self.inner_weight, self.inner_bias))
