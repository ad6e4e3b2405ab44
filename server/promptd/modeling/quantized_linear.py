"""Linear layers in 8-bit integers: weights per output channel, activations per row, sums exact.

Each weight row and each activation row has a scale of its own, its largest magnitude; between them only integers are
multiplied and added, so a row's product has the same bits beside any neighbours. (torch's own dynamic quantization has
one scale for the whole batch: there one row's outlier costs every other row precision.) On a CPU with AVX-512 VNNI
this is 3 to 5 times as fast as float32; without VNNI activations are kept to 7 bits, because oneDNN's sums would
overflow.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import nn

from promptd.modeling.frozen_linear import FrozenLinear, runs_here
from promptd.modeling.integer_product import packed
from promptd.modeling.kernels import load_kernel

QUANTIZE = "quantize.c"
LARGEST_WEIGHT = 127
_TINY = torch.finfo(torch.float32).tiny


@functools.cache
def can_quantize() -> bool:
    """Return whether 8-bit products work here."""
    rows = torch.ones(2, 32)
    return runs_here(lambda: bool((QuantizedLinear(torch.eye(32), None)(rows) - rows).abs().max() < 0.01))


@functools.cache
def _largest_activation() -> int:
    return 127 if torch.cpu._is_vnni_supported() else 63


class QuantizedLinear(FrozenLinear):
    """A frozen linear layer that multiplies in 8 bits: integers, packed, and the scale of each output channel."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        wide = weight.float().contiguous()
        scales = wide.abs().amax(1).clamp_min(_TINY) / LARGEST_WEIGHT
        integers = (wide / scales.unsqueeze(1)).round().to(torch.int8)
        self.scales = nn.Parameter(scales.unsqueeze(1), requires_grad=False)
        largest = _largest_activation()
        wide_bias = None if bias is None else bias.detach().float().contiguous()
        self._multiplied = packed(integers, scales / largest, wide_bias, zero=largest + 1)
        self.integers = nn.Parameter(self._multiplied.integers, requires_grad=False)

    def dense(self) -> Iterator[torch.Tensor]:
        """Yield what the integers stand for: gradients are those of the product which is served."""
        first = 0
        for rows in self._multiplied.rows():
            yield rows * self.scales[first : first + len(rows)]
            first += len(rows)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply; each row has a scale of its own."""
        rows = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
        found = self._multiplied(*_quantized(_kernel(), rows))
        return found.view(*hidden.shape[:-1], found.shape[-1]).to(hidden.dtype)


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """Return what makes integers of rows in one pass, `kernels/quantize.c`, where it can be had and is right."""
    return load_kernel(QUANTIZE, bind=_bound, passes=_passes)


def _bound(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.promptd_quantize.argtypes = [pointer, number, number, number, pointer, pointer, number]
    library.promptd_quantize.restype = None
    return library


def _passes(kernel: ctypes.CDLL) -> bool:
    rows = torch.randn(3, 41, generator=torch.Generator().manual_seed(0))
    found, wanted = _quantized(kernel, rows), _quantized(None, rows)
    return bool((found[0].int() - wanted[0].int()).abs().max() <= 1) and torch.equal(found[1], wanted[1])


def _quantized(kernel: ctypes.CDLL | None, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `[num_rows, in_features]` as uint8, and each row's largest magnitude `[num_rows, 1]`."""
    largest = _largest_activation()
    if kernel is None:
        sizes = rows.abs().amax(1, keepdim=True)
        return (rows * (largest / sizes.clamp_min(_TINY))).add_(largest + 1.5).to(torch.uint8), sizes
    integers, sizes = torch.empty_like(rows, dtype=torch.uint8), rows.new_empty(rows.shape[0], 1)
    kernel.promptd_quantize(
        rows.data_ptr(), *rows.shape, largest, integers.data_ptr(), sizes.data_ptr(), torch.get_num_threads()
    )
    return integers, sizes
