"""A prompt that learns a classification head beside it, for models off which classes are read.

What is learned is one flat tensor, the prompt's numbers and then the head's, so that whoever steps, folds, stores and
measures prompts need not know of heads; `split` takes it apart. The head is linear, starts like BERT's and has a rate
of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from promptd_store import BaseModelSpec, PromptKind
from torch import nn

from promptd.training.methods.base import PromptMethod, group

HEAD_STD = 0.02
HEAD_LEARNING_RATE = 5e-3


class HeadedPrompt(PromptMethod):
    """Another method's prompt and a linear head over it."""

    def __init__(self, inner: PromptMethod, num_classes: int, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.config, self.embedding_std, self.generator = inner.config, inner.embedding_std, inner.generator
        self.inner = inner
        head = torch.randn(num_classes, hidden_size + 1, generator=inner.generator) * HEAD_STD
        head[:, -1] = 0
        self.head = nn.Parameter(head)  # weights, and the bias in the last column

    def materialize(self) -> torch.Tensor:
        """Return the prompt's numbers and the head's, `[num_prompt + num_classes * (hidden_size + 1)]`."""
        return torch.cat([self.inner.materialize().flatten(), self.head.flatten()])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the prompt's groups and the head's."""
        return [*self.inner.parameter_groups(), group([self.head], HEAD_LEARNING_RATE)]


def split(
    flat: torch.Tensor, kind: PromptKind, num_classes: int, spec: BaseModelSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompt in its own layout and the head `[num_classes, hidden_size + 1]`, as views."""
    num_head = num_classes * (spec.hidden_size + 1)
    prompt, head = flat.split([flat.numel() - num_head, num_head])
    if kind is PromptKind.SOFT:
        shaped = prompt.view(-1, spec.hidden_size)
    else:
        shaped = prompt.view(spec.num_layers, 2, spec.num_kv_heads, -1, spec.head_dim)
    return shaped, head.view(num_classes, -1)
