"""Prefix-tuning (Li & Liang, ACL 2021, arXiv 2101.00190): keys and values of every layer are learned.

    [K; V] = scale * (W_2 tanh(W_1 E + b_1) + b_2)         section 4.3; E: one embedding per virtual token

or, without the network, K and V directly (the paper's ablation; P-tuning v2's choice). The start is the
activations of real words (section 7.4): the direct form copies them; the network's last layer is solved for them by
least squares, which reaches exactly what the authors' 500 steps of regression approach. `scale` holds the standard
deviation of those activations per layer, for keys and for values, so that rates are in units of it on any model (ours).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from promptd_store import PromptKind
from torch import nn

from promptd.training.methods.base import PromptMethod, group

NETWORK_SIZE = 512


class PrefixTuning(PromptMethod):
    """Per-layer keys and values; `key_values` are the activations to start from."""

    name: ClassVar[str] = "prefix"
    kind: ClassVar[PromptKind] = PromptKind.PREFIX

    scale: torch.Tensor  # [num_layers, 2, 1, 1, 1]

    def __init__(self, key_values: torch.Tensor, embedding_std: float) -> None:
        super().__init__(embedding_std)
        self.shape = key_values.shape  # [num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]
        scale = key_values.detach().float().std(dim=(2, 3, 4), keepdim=True).clamp_min(1e-6)
        self.register_buffer("scale", scale)

    def materialize(self) -> torch.Tensor:
        """Return `[num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]`."""
        return self.normalized() * self.scale

    @abstractmethod
    def normalized(self) -> torch.Tensor:
        """Return the prefix in units of `scale`."""

    @property
    def stored_params(self) -> int:
        """Two vectors per layer, head and virtual token."""
        return self.shape.numel()


class DirectPrefix(PrefixTuning):
    """Keys and values are the parameters."""

    def __init__(self, key_values: torch.Tensor, embedding_std: float) -> None:
        super().__init__(key_values, embedding_std)
        self.key_values = nn.Parameter(key_values.detach().float() / self.scale)

    def normalized(self) -> torch.Tensor:
        """Return the parameters."""
        return self.key_values

    def parameter_groups(self, learning_rate: float, network_learning_rate: float) -> list[dict[str, Any]]:
        """Return one group: the parameters have unit scale."""
        return [group([self.key_values], learning_rate)]


class NetworkPrefix(PrefixTuning):
    """Keys and values come out of one tanh network over an embedding per virtual token."""

    def __init__(
        self, key_values: torch.Tensor, hidden_size: int, embedding_std: float, network_size: int = NETWORK_SIZE
    ) -> None:
        super().__init__(key_values, embedding_std)
        num_layers, _, num_heads, num_tokens, head_dim = key_values.shape
        # Noise of unit scale, as the authors' embedding: rows must differ to reach any activations.
        self.embedding = nn.Parameter(torch.randn(num_tokens, hidden_size))
        self.inner = nn.Linear(hidden_size, network_size)
        self.outer = nn.Linear(network_size, num_layers * 2 * num_heads * head_dim)
        target = (key_values.detach().float() / self.scale).permute(3, 0, 1, 2, 4).reshape(num_tokens, -1)
        with torch.no_grad():
            features = torch.tanh(self.inner(self.embedding))
            missing = target - self.outer(features)
            self.outer.weight += torch.linalg.lstsq(features, missing, driver="gelsd").solution.T

    def normalized(self) -> torch.Tensor:
        """Return the network's output in the prefix's layout."""
        num_layers, _, num_heads, num_tokens, head_dim = self.shape
        flat: torch.Tensor = self.outer(torch.tanh(self.inner(self.embedding)))
        return flat.view(num_tokens, num_layers, 2, num_heads, head_dim).permute(1, 2, 3, 0, 4)

    def parameter_groups(self, learning_rate: float, network_learning_rate: float) -> list[dict[str, Any]]:
        """Return the embedding at unit scale and the network at its own rate."""
        return [
            group([self.embedding], learning_rate),
            group([*self.inner.parameters(), *self.outer.parameters()], network_learning_rate),
        ]
