"""Ablations of the papers, which nobody should train with: methods of this folder, not of jobs.

- `mlp`: LayerNorm(W_up f(W_down P)) without the skip (Razdaibiedina et al. 2023, "PT w/ MLP").
- `lstm`: a two-layer bidirectional LSTM and a two-layer head over the tokens, without a skip ("PT w/ LSTM").
- `embedding_prefix`: prefix-tuning's network, but to one row of embeddings a token instead of keys and values of every
  layer (Li & Liang 2021, "embedding-only").

All live at the scale of the model's embeddings, as the methods of jobs do: the networks see tokens of unit size, and
what they return is multiplied by the embeddings' standard deviation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn.functional import linear

from promptd.training.checks import Positive, Size
from promptd.training.methods import METHODS, MethodConfig, PromptMethod, ResidualConfig, ResidualPromptTuning
from promptd.training.methods.base import group, linear_parameter


@dataclass(frozen=True, slots=True)
class MlpConfig(ResidualConfig):
    """Residual prompt tuning's settings, without the skip."""

    name: ClassVar[str] = "mlp"


class MlpPrompt(ResidualPromptTuning):
    """P' = LayerNorm(W_up f(W_down P))."""

    config_class = MlpConfig

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return self.branch()


@dataclass(frozen=True, slots=True)
class LstmConfig(MethodConfig):
    """Settings of the LSTM; P itself learns at `learning_rate`."""

    name: ClassVar[str] = "lstm"

    network_learning_rate: Positive = 1e-3


class LstmPrompt(PromptMethod):
    """P' = std * head(LSTM(P / std))."""

    config_class = LstmConfig
    config: LstmConfig

    def __init__(
        self, config: LstmConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        hidden = start.shape[1]
        self.prompt = nn.Parameter(start.clone())
        self.lstm = nn.LSTM(hidden, hidden // 2, num_layers=2, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        with torch.no_grad():  # torch's default start, from this method's own generator
            for name, parameter in [*self.lstm.named_parameters(), *self.head.named_parameters()]:
                width = hidden // 2 if name in dict(self.lstm.named_parameters()) else hidden
                parameter.copy_(linear_parameter(tuple(parameter.shape), width, generator))

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        inside, _ = self.lstm(self.prompt / self.embedding_std)
        return cast(torch.Tensor, self.head(inside)) * self.embedding_std

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return P at embedding scale and the networks at their own rate."""
        return [
            group([self.prompt], self.config.learning_rate * self.embedding_std),
            group([*self.lstm.parameters(), *self.head.parameters()], self.config.network_learning_rate),
        ]


@dataclass(frozen=True, slots=True)
class EmbeddingPrefixConfig(MethodConfig):
    """Settings of prefix-tuning's network over embeddings alone."""

    name: ClassVar[str] = "embedding_prefix"

    learning_rate: Positive = 0.1
    network_learning_rate: Positive = 1e-3
    network_size: Size = 512


class EmbeddingPrefix(PromptMethod):
    """P' = std * (W_outer tanh(W_inner E + b_inner) + b_outer), beginning at the initial prompt."""

    config_class = EmbeddingPrefixConfig
    config: EmbeddingPrefixConfig

    def __init__(
        self, config: EmbeddingPrefixConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        (num_tokens, hidden), size = start.shape, config.network_size
        self.embedding = nn.Parameter(torch.randn(num_tokens, size, generator=generator))
        self.inner_weight = linear_parameter((size, size), size, generator)
        self.inner_bias = linear_parameter((size,), size, generator)
        self.outer_weight = linear_parameter((hidden, size), size, generator)
        self.outer_bias = linear_parameter((hidden,), size, generator)
        with torch.no_grad():
            missing = start / embedding_std - linear(self._features(), self.outer_weight, self.outer_bias)
            self.outer_weight.add_(torch.linalg.lstsq(self._features(), missing, driver="gelsd").solution.T)

    def _features(self) -> torch.Tensor:
        return torch.tanh(linear(self.embedding, self.inner_weight, self.inner_bias))

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        return linear(self._features(), self.outer_weight, self.outer_bias) * self.embedding_std

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the embedding at unit scale and the network at its own rate."""
        network = [self.inner_weight, self.inner_bias, self.outer_weight, self.outer_bias]
        return [
            group([self.embedding], self.config.learning_rate),
            group(network, self.config.network_learning_rate),
        ]


ABLATIONS: tuple[type[PromptMethod], ...] = (MlpPrompt, LstmPrompt, EmbeddingPrefix)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Let jobs of this process train the ablations while this lasts."""
    known = cast("dict[str, type[PromptMethod]]", METHODS)
    known.update({method.config_class.name: method for method in ABLATIONS})
    try:
        yield
    finally:
        for method in ABLATIONS:
            del known[method.config_class.name]
