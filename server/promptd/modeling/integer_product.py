"""Products of 8-bit rows and a packed 8-bit weight: by `kernels/linear_int8.c`, or by oneDNN where that cannot run.

oneDNN's reaches half of what the processor's instructions for it can do in a decode step's few rows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Protocol

import torch

from promptd.modeling.frozen_linear import blocks_of
from promptd.modeling.kernels import load_kernel

LINEAR_INT8 = "linear_int8.c"
_GROUP = 4
"""Inputs that one instruction takes."""


class IntegerProduct(Protocol):
    """A weight, packed."""

    integers: torch.Tensor
    """All of its integers, int8, in an order of the product's own."""

    def rows(self) -> Iterator[torch.Tensor]:
        """Yield the weight's rows, `[num_outputs, in_features]` at a time, int8, in the order of the outputs."""

    def __call__(self, integers: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Map rows `[num_rows, in_features]`, uint8 around `zero`, and their sizes `[num_rows, 1]` to float32."""


class _Product(ctypes.Structure):
    """`product` of the source."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "offsets", "scales", "bias", "out")),
        ("num_outputs", ctypes.c_int64),
    ]


class _Kernel:
    """The compiled functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        number = ctypes.c_int64
        library.promptd_linear_int8_panel.restype = number
        self.panel: int = library.promptd_linear_int8_panel() if torch.cpu._is_vnni_supported() else 0
        self.run = library.promptd_linear_int8
        self.run.argtypes = [ctypes.POINTER(_Product), number, number]
        self.run.restype = None


@functools.cache
def _kernel() -> _Kernel | None:
    kernel = load_kernel(LINEAR_INT8, bind=_Kernel, passes=_passes)
    return kernel if kernel is not None and kernel.panel else None


def _passes(kernel: _Kernel) -> bool:
    if not kernel.panel:
        return True  # there is nothing to be wrong
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (101, 36), generator=generator, dtype=torch.int8)
    rows = torch.randint(0, 256, (11, 36), generator=generator, dtype=torch.uint8)
    scales, bias, sizes = (torch.rand(*shape, generator=generator) for shape in ((101,), (101,), (11, 1)))
    found = CompiledProduct(weight, scales, bias, 128, kernel)(rows, sizes)
    wanted = (rows.double() - 128) @ weight.double().t() * scales * sizes + bias
    return torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def packed(weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, zero: int) -> IntegerProduct:
    """Pack a weight `[out_features, in_features]`, int8.

    A product is multiplied with `scales` `[out_features]` and its row's size; `bias` is added. `zero` is what stands
    for 0 in the rows.
    """
    kernel = _kernel() if weight.shape[1] % _GROUP == 0 else None
    if kernel is None:
        return OneDnnProduct(weight, scales, bias, zero)
    return CompiledProduct(weight, scales, bias, zero, kernel)


class CompiledProduct:
    """Our kernel's; `in_features` is a multiple of 4."""

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, zero: int, kernel: _Kernel
    ) -> None:
        self._kernel = kernel
        self._num_outputs, self._num_inputs = weight.shape
        more = -self._num_outputs % kernel.panel

        def filled(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, more)).contiguous()

        panels = torch.nn.functional.pad(weight, (0, 0, 0, more)).unflatten(0, (-1, kernel.panel))
        self.integers = panels.unflatten(2, (-1, _GROUP)).transpose(1, 2).contiguous()  # [num_panels, in / 4, panel, 4]
        self._offsets = filled(zero * weight.sum(1, dtype=torch.int32))
        self._scales, self._bias = filled(scales), filled(scales.new_zeros(self._num_outputs) if bias is None else bias)

    def __call__(self, integers: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        out = sizes.new_empty(integers.shape[0], self._num_outputs)
        product = _Product(
            integers.data_ptr(), sizes.data_ptr(), self._num_inputs, self.integers.data_ptr(), self._offsets.data_ptr(),
            self._scales.data_ptr(), self._bias.data_ptr(), out.data_ptr(), self._num_outputs,
        )  # fmt: skip
        self._kernel.run(product, integers.shape[0], torch.get_num_threads())
        return out

    def rows(self) -> Iterator[torch.Tensor]:
        """Unpack the weight."""
        panel = self._kernel.panel
        for outputs in blocks_of((self._num_outputs, self._num_inputs), panel):
            panels = self.integers[outputs.start // panel : -(-outputs.stop // panel)]
            yield panels.transpose(1, 2).reshape(-1, self._num_inputs)[: len(outputs)]


class OneDnnProduct:
    """Torch's own, on every processor."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, zero: int) -> None:
        self.integers = weight
        self._packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scales, self._bias, self._zero = scales, bias, zero
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, integers: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        sums: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, self._zero, self._packed, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return sums * sizes if self._bias is None else torch.addcmul(self._bias, sums, sizes)

    def rows(self) -> Iterator[torch.Tensor]:
        """Yield the weight as it is kept: oneDNN does not give it back."""
        for outputs in blocks_of(self.integers.shape, 1):
            yield self.integers[outputs.start : outputs.stop]
