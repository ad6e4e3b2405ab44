"""Linear layers in float32 by `kernels/linear.c`, on the CPU.

A decode step is bound by how fast weights come from memory: this product streams them at the speed of the memory, from
huge pages, where oneDNN's reaches two thirds of it for one row; for many rows it is as fast. A row's bits do not
depend on its neighbours.
"""

from __future__ import annotations

import ctypes
import functools
import mmap

import torch

from promptd.modeling.frozen_linear import FrozenLinear
from promptd.modeling.kernels import load_kernel

LINEAR = "linear.c"
_HUGE_PAGE = 2 << 20


class _Kernel:
    """The compiled functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.promptd_linear_panel.restype = number
        self.panel: int = library.promptd_linear_panel()
        self.run = library.promptd_linear
        self.run.argtypes = [pointer, number, number, pointer, pointer, pointer, number, number]
        self.run.restype = None


@functools.cache
def _kernel() -> _Kernel | None:
    return load_kernel(LINEAR, bind=_Kernel, passes=_passes)


def _passes(kernel: _Kernel) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, bias, rows = (torch.randn(*shape, generator=generator) for shape in ((70, 1024), (70,), (21, 1024)))
    found = CompiledLinear(weight, bias, kernel)(rows)
    return torch.allclose(found, torch.nn.functional.linear(rows, weight, bias), atol=1e-3)


def can_compile() -> bool:
    """Return whether the compiled product is there and right."""
    return _kernel() is not None


class CompiledLinear(FrozenLinear):
    """A frozen linear layer over a packed copy of its weight, both float32; `kernel` is for its trial alone."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernel: _Kernel | None = None) -> None:
        super().__init__(weight, bias)
        kernel = kernel or _kernel()
        if kernel is None:
            raise RuntimeError("the kernel of linear layers is not compiled")
        self._kernel = kernel
        num_outputs, num_inputs = weight.shape
        num_full, num_left = divmod(num_outputs, kernel.panel)
        num_panels = num_full + (num_left > 0)
        self._packed = _empty_in_huge_pages(num_panels * kernel.panel * num_inputs)
        panels = self._packed.view(num_panels, num_inputs, kernel.panel)
        full = weight[: num_full * kernel.panel].unflatten(0, (num_full, kernel.panel))
        panels[:num_full] = full.transpose(1, 2)
        panels[num_full:, :, num_left:] = 0.0
        panels[num_full:, :, :num_left] = weight[num_full * kernel.panel :].t()
        self._bias = torch.zeros(num_panels * kernel.panel)
        if bias is not None:
            self._bias[:num_outputs] = bias

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply on the CPU."""
        rows = rows.contiguous()
        num_outputs, num_inputs = self.weight.shape
        out = rows.new_empty(rows.shape[0], num_outputs)
        self._kernel.run(
            rows.data_ptr(), rows.shape[0], num_inputs, self._packed.data_ptr(), self._bias.data_ptr(),
            out.data_ptr(), num_outputs, torch.get_num_threads(),
        )  # fmt: skip
        return out


def _empty_in_huge_pages(count: int) -> torch.Tensor:
    """Return room for float32 numbers; where the system lets, in pages of 2 MiB, which stream a third faster."""
    room = torch.empty(count)
    first = -(-room.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (room.data_ptr() + 4 * count - first) // _HUGE_PAGE * _HUGE_PAGE
    if length > 0 and hasattr(mmap, "MADV_HUGEPAGE"):  # advice: where it is refused, nothing is lost
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(first, length, mmap.MADV_HUGEPAGE)
    return room
