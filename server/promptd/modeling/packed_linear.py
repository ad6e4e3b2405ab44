"""Linear layers with weights packed once for the CPU's matrix kernels.

Decode steps multiply a handful of rows with every weight; unpacked BLAS wastes most of its time there. oneDNN's
packed form is 1.6 to 2 times as fast from 4 to 32 rows. The ops are private to torch: `can_pack` tries them once
and everything falls back to the plain layer where they are missing. They have no autograd formula (the gradient
would silently be None), so the packed product is an `autograd.Function` with its own backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this build of torch has working packed products of this dtype."""
    is_fast = dtype is torch.float32 or (dtype is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    if not is_fast or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight, rows = torch.eye(32, dtype=dtype), torch.ones(2, 32, dtype=dtype)
        return torch.equal(_packed_product(rows, _pack(weight), None), rows)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return packed


def _packed_product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


class _PackedFunction(torch.autograd.Function):
    """`rows @ weight.T + bias` from the packed weight; backward from the kept original."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        return _packed_product(rows, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grads[0] @ ctx.weight, None, None, None


class PackedLinear(nn.Module):
    """A frozen linear layer over a packed copy of its weight.

    `tile_rows > 0` is the strict mode: rows go through the kernel in tiles of exactly this many, because the kernel
    picked for 1, 4 or 16 rows rounds differently; then a row's result does not depend on its neighbours' number.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, pack: bool, tile_rows: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out_features, in_features]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.tile_rows = tile_rows
        self._packed = _pack(weight.contiguous()) if pack else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.tile_rows:
            tiles = [self._tile(tile) for tile in rows.split(self.tile_rows)]
            product = torch.cat(tiles) if len(tiles) != 1 else tiles[0]
        else:
            product = self._product(rows)
        return product.view(*hidden.shape[:-1], self.weight.shape[0])

    def _tile(self, rows: torch.Tensor) -> torch.Tensor:
        missing = self.tile_rows - rows.shape[0]
        if missing:
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        return self._product(rows)[: self.tile_rows - missing]

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return nn.functional.linear(rows, self.weight, self.bias)
        if torch.is_grad_enabled() and rows.requires_grad:
            product: torch.Tensor = _PackedFunction.apply(  # type: ignore[no-untyped-call]
                rows, self._packed, self.weight, self.bias
            )
            return product
        return _packed_product(rows, self._packed, self.bias)


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
