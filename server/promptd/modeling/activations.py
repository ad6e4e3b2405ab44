"""Activations in one kernel instead of many."""

from __future__ import annotations

from torch import nn
from transformers.activations import NewGELUActivation


def fuse_activations(model: nn.Module) -> int:
    """Replace GPT-2's GELU, written as six elementwise ops, by torch's fused one (equal to 1e-7); return how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
                count += 1
    return count
