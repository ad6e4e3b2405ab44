"""Linear layers with weights packed once for the CPU's matrix kernels.

Decode steps multiply a handful of rows with every weight; unpacked BLAS wastes most of its time there. oneDNN's
packed form is 1.6 to 2 times as fast from 4 to 32 rows. Where it is missing everything falls back to the plain layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from promptd.modeling.frozen_linear import FrozenLinear, runs_here


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether packed products of this dtype work here, and are fast."""
    is_fast = dtype is torch.float32 or (dtype is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    if not is_fast or not torch.backends.mkldnn.is_available():
        return False
    weight, rows = torch.eye(32, dtype=dtype), torch.ones(2, 32, dtype=dtype)
    return runs_here(lambda: torch.equal(PackedLinear(weight, None, pack=True)(rows), rows))


class PackedLinear(FrozenLinear):
    """A frozen linear layer over a packed copy of its weight.

    `tile_rows > 0` is the strict mode: rows go through the kernel in tiles of exactly this many, because the kernel
    picked for 1, 4 or 16 rows rounds differently; then a row's result does not depend on its neighbours' number.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, pack: bool, tile_rows: int = 0) -> None:
        super().__init__(weight, bias)
        self.plain = nn.Parameter(weight, requires_grad=False)
        self.tile_rows = tile_rows
        self._packed: torch.Tensor | None = None
        if pack:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)

    def dense(self) -> Iterator[torch.Tensor]:
        """Yield the weight, which is kept beside its packed form: oneDNN does not give it back."""
        yield self.plain

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply with the packed weight, or with the plain one; in strict mode tile by tile."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.tile_rows:
            tiles = [self._tile(tile) for tile in rows.split(self.tile_rows)]
            found = torch.cat(tiles) if len(tiles) != 1 else tiles[0]
        else:
            found = self._product(rows)
        return found.view(*hidden.shape[:-1], found.shape[-1])

    def _tile(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[0]
        return self._product(nn.functional.pad(rows, (0, 0, 0, self.tile_rows - count)))[:count]

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return nn.functional.linear(rows, self.plain, self.bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return product
