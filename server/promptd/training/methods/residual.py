"""Residual Prompt Tuning (Razdaibiedina et al., Findings of ACL 2023, arXiv 2305.03937).

    P'_i = P_i + LayerNorm(W_up relu(W_down P_i + b_down) + b_up)          section 3 of the paper

One network is shared by all virtual tokens, both linear layers have a bias, the LayerNorm is the last step of the
branch, before the skip, and everything starts from torch's default initialisation. After training P' is computed once
and the network is dropped.

The authors' recipe is tied to T5, whose embeddings have a standard deviation of the order of 1 to 40; GPT-2's
have 0.02. There a LayerNorm with gain 1 makes the branch fifty times the prompt it is added to, and W_down P drowns in
b_down, so that all virtual tokens get the same branch. Hence everything here is the authors' in units of the standard
deviation s of the base model's embedding output: the gain starts at s, W_down at 1/s times its default, P and
the LayerNorm learn at s times the rate, W_down at 1/s times. With s = 1 nothing changes (the paper's section 3.2 has
the LayerNorm, 5.2 the learning rates; the scaling is ours). The two linear layers have a rate of their own, as an
option of the authors' code has it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar

import torch
from promptd_store import PromptKind
from torch import nn

from promptd.training.methods.base import PromptMethod, group

MAX_BOTTLENECK_SIZE = 800


class ResidualPromptTuning(PromptMethod):
    """P' = P + LayerNorm(W_up relu(W_down P)), one shared network."""

    name: ClassVar[str] = "residual"
    kind: ClassVar[PromptKind] = PromptKind.SOFT

    def __init__(self, initial: torch.Tensor, embedding_std: float, bottleneck_size: int | None = None) -> None:
        super().__init__(embedding_std)
        hidden_size = initial.shape[1]
        bottleneck = bottleneck_size or min(MAX_BOTTLENECK_SIZE, hidden_size)
        self.prompt = nn.Parameter(initial.detach().float().clone())  # [num_virtual_tokens, hidden_size]
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        with torch.no_grad():
            self.norm.weight.fill_(embedding_std)
            self.down.weight /= embedding_std

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        branch: torch.Tensor = self.norm(self.up(torch.relu(self.down(self.prompt))))
        return self.prompt + branch

    def parameter_groups(self, learning_rate: float, network_learning_rate: float) -> list[dict[str, Any]]:
        """Return prompt and LayerNorm at embedding scale, W_down at its inverse, the rest at the network's rate."""
        return [
            group(chain([self.prompt], self.norm.parameters()), learning_rate * self.embedding_std),
            group([self.down.weight], network_learning_rate / self.embedding_std),
            group(chain([self.down.bias], self.up.parameters()), network_learning_rate),
        ]

    @property
    def stored_params(self) -> int:
        """Only P' is served."""
        return self.prompt.numel()
