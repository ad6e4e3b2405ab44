"""Frozen linear layers whose matrix product is another one than torch's own, and how a model gets them.

The products are kernels of ours, or ops that are private to torch, which may be missing or refuse to run here:
`runs_here` tries them once. They have no autograd formula (the gradient would silently be None), so the product is an
`autograd.Function` with its own backward, for which the weight is unpacked block by block: training is rare beside
serving, and memory is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from promptd.modeling.recording import opaque

BLOCK_NUMBERS = 4 << 20
"""Numbers of a weight that are unpacked at a time."""


def blocks_of(shape: Sequence[int], multiple: int) -> Iterator[range]:
    """Cut the outputs of a weight `[out_features, in_features]` into blocks of about `BLOCK_NUMBERS` numbers.

    Each but the last is a multiple of so many outputs.
    """
    num_outputs, num_inputs = shape
    step = max(1, BLOCK_NUMBERS // (num_inputs * multiple)) * multiple
    for first in range(0, num_outputs, step):
        yield range(first, min(first + step, num_outputs))


def runs_here(trial: Callable[[], bool]) -> bool:
    """Return whether a product is there and right, in this build of torch and on this machine."""
    try:
        return trial()
    except (AttributeError, RuntimeError):
        return False


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        num_outputs, num_inputs = ctx.layer.weight.shape
        inputs = ctx.layer.passed_back(grads[0].reshape(-1, num_outputs))
        return inputs.view(*grads[0].shape[:-1], num_inputs), None


class _Likeness(torch.Tensor):
    """A weight's shape, dtype and device. It has no numbers, and whoever computes with it is told so."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> _Likeness:
        """Look like a weight."""
        likeness: _Likeness = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        return likeness

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise `TypeError`."""
        raise TypeError(f"{func} of a weight that is packed: its layer multiplies with it, nobody else does")


class FrozenLinear(nn.Module, ABC):
    """A linear layer that is never learned and that gradients pass.

    Its weight is kept as its product wants it: `weight` has the shape, the dtype and the device that a model's own code
    may ask for, and no numbers.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._likeness = _Likeness(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """What a weight `[out_features, in_features]` would look like."""
        return self._likeness

    @abstractmethod
    def dense(self) -> Iterator[torch.Tensor]:
        """Yield the weight's numbers, `[num_outputs, in_features]` at a time, in the order of the outputs."""

    @abstractmethod
    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, bias and all; no gradient is asked for."""

    def passed_back(self, grads: torch.Tensor) -> torch.Tensor:
        """Map gradients of outputs `[num_rows, out_features]` to those of inputs `[num_rows, in_features]`."""
        inputs, first = grads.new_empty(grads.shape[0], self.weight.shape[1]), 0
        for rows in self.dense():
            inputs.addmm_(grads[:, first : first + len(rows)], rows.to(grads.dtype), beta=min(first, 1))
            first += len(rows)
        return inputs

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, with a gradient where one is wanted."""
        return opaque(self._multiply, hidden)

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            product: torch.Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(hidden)


def replace_linears(model: nn.Module, make: Callable[[torch.Tensor, torch.Tensor | None], nn.Module]) -> None:
    """Replace every `nn.Linear` and GPT-2 `Conv1D` below `model` by what `make` makes of its weight and bias."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_linear(child):
                weight = child.weight.t() if isinstance(child, Conv1D) else child.weight
                setattr(parent, name, make(weight.detach(), child.bias))


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def let_files_go(model: nn.Module) -> None:
    """Copy what will not be replaced: as long as one tensor lies in a checkpoint's file, all of the file is mapped."""
    copied: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in copied and not (name == "weight" and _is_linear(module)):
                parameter.data = parameter.detach().clone()
                copied.add(id(parameter))
        for name, buffer in module.named_buffers(recurse=False):  # BART's is a view, which keeps what it views
            setattr(module, name, buffer.clone())
