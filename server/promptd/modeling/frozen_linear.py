"""Frozen linear layers whose matrix product is another one than torch's own, and how a model gets them.

The products are ops that are private to torch. They may be missing or refuse to run here: `runs_here` tries them once.
They have no autograd formula (the gradient would silently be None), so the product is an `autograd.Function` with its
own backward, from the weight that is kept beside whatever form of it is multiplied with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from promptd.modeling.recording import opaque


def runs_here(trial: Callable[[], bool]) -> bool:
    """Return whether a product is there and right, in this build of torch and on this machine."""
    try:
        return trial()
    except (AttributeError, RuntimeError):
        return False


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.weight = layer.weight
        return layer.product(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.weight, None


class FrozenLinear(nn.Module, ABC):
    """A linear layer that is never learned and that gradients pass; its weight is kept for these and for digests."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out_features, in_features]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @abstractmethod
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Map `[num_rows, in_features]` to `[num_rows, out_features]`, bias and all; no gradient is asked for."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return opaque(self._multiply, hidden)

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.multiply(rows).view(*hidden.shape[:-1], self.weight.shape[0])

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Map `[num_rows, in_features]` to `[num_rows, out_features]`, with a gradient where one is wanted."""
        if torch.is_grad_enabled() and rows.requires_grad:
            product: torch.Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(rows)


def replace_linears(model: nn.Module, make: Callable[[torch.Tensor, torch.Tensor | None], nn.Module]) -> None:
    """Replace every `nn.Linear` and GPT-2 `Conv1D` below `model` by what `make` makes of its weight and bias."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                weight = child.weight
            elif isinstance(child, Conv1D):
                weight = child.weight.t()
            else:
                continue
            setattr(parent, name, make(weight.detach(), child.bias))
