"""Linear layers in float32 by `kernels/linear.c`, on the CPU.

A decode step is bound by how fast weights come from memory: this product streams them at the speed of the memory, from
huge pages, where oneDNN's reaches two thirds of it for one row; for many rows it is as fast. A row's bits do not
depend on its neighbours.

Most checkpoints hold 16-bit numbers. A weight all of whose numbers are such is packed in 16 bits and widened in
registers: the same product, bit for bit, from half the memory.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator

import torch
from torch import nn

from promptd.modeling.frozen_linear import FrozenLinear, blocks_of
from promptd.modeling.kernels import load_kernel

LINEAR = "linear.c"
STORED = {torch.bfloat16: "STORED_BFLOAT16", torch.float16: "STORED_FLOAT16", torch.float32: "STORED_FLOAT32"}
"""Dtypes that weights are packed in, the first one that loses nothing, and what the source calls them."""
Product = Callable[[torch.Tensor], torch.Tensor]
_HUGE_PAGE = 2 << 20


class LinearKernel:
    """The compiled functions for weights that are packed in one dtype."""

    def __init__(self, library: ctypes.CDLL, stored: torch.dtype) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.promptd_linear_panel.restype = number
        self.panel: int = library.promptd_linear_panel()
        self.dtype = torch.float32 if stored is torch.float32 else torch.int16
        """Of packed weights: 16 bits in an order of the kernel's are no numbers to anybody else."""
        self._multiply, self._pack = library.promptd_linear, library.promptd_linear_pack
        self._unpack = library.promptd_linear_unpack
        self._multiply.argtypes = [pointer, number, number, pointer, pointer, pointer, number, number]
        self._pack.argtypes = [pointer, number, number, number, number, pointer, number]
        self._unpack.argtypes = [pointer, number, number, pointer, number]
        self._multiply.restype = self._unpack.restype = None
        self._pack.restype = ctypes.c_int

    def packed(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Pack a weight `[out_features, in_features]`, float32; None where that would lose a bit of it."""
        num_outputs, num_inputs = weight.shape
        if self.dtype is not torch.float32 and num_inputs % 2:  # bfloat16 lie in pairs
            return None
        room = _empty_in_huge_pages(-(-num_outputs // self.panel) * self.panel * num_inputs, self.dtype)
        is_whole = self._pack(
            weight.data_ptr(), *weight.stride(), num_outputs, num_inputs, room.data_ptr(), torch.get_num_threads()
        )
        return room if is_whole else None

    def unpacked(self, packed: torch.Tensor, outputs: range, num_inputs: int) -> torch.Tensor:
        """Return the rows of some outputs, `[len(outputs), in_features]`; the first one begins a panel."""
        turned = torch.empty(num_inputs, len(outputs))
        first = packed[outputs.start * num_inputs :]
        self._unpack(first.data_ptr(), len(outputs), num_inputs, turned.data_ptr(), torch.get_num_threads())
        return turned.t()

    def product(self, packed: torch.Tensor, bias: torch.Tensor | None, shape: torch.Size) -> Product:
        """Return what maps `[..., in_features]` to `[..., out_features]` by a packed weight of this shape.

        All that stays the same is looked up here: small products take as long as what is in front of them.
        """
        num_outputs, num_inputs = shape
        filled = torch.zeros(-(-num_outputs // self.panel) * self.panel)  # for the whole of the last panel
        if bias is not None:
            filled[:num_outputs] = bias
        multiply, weight_at, bias_at = self._multiply, packed.data_ptr(), filled.data_ptr()

        def product(hidden: torch.Tensor, _kept: tuple[torch.Tensor, torch.Tensor] = (packed, filled)) -> torch.Tensor:
            if hidden.shape[-1] != num_inputs or hidden.dtype is not torch.float32:
                raise ValueError(f"a row is {num_inputs} float32 numbers, not {hidden.shape[-1]} {hidden.dtype}")
            rows = hidden.contiguous()
            out = rows.new_empty((*rows.shape[:-1], num_outputs))
            multiply(
                rows.data_ptr(), rows.numel() // num_inputs, num_inputs, weight_at, bias_at, out.data_ptr(),
                num_outputs, torch.get_num_threads(),
            )  # fmt: skip
            return out

        return product


@functools.cache
def linear_kernel(stored: torch.dtype) -> LinearKernel | None:
    """Return the kernel for weights packed in this dtype; None where it cannot be had."""
    return load_kernel(LINEAR, STORED[stored], bind=lambda library: LinearKernel(library, stored), passes=_passes)


def _passes(kernel: LinearKernel) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, bias, rows = (torch.randn(*shape, generator=generator) for shape in ((103, 1024), (103,), (21, 1024)))
    weight = weight.bfloat16().half().float()  # what either holds
    packed = kernel.packed(weight)
    if packed is None or not torch.equal(kernel.unpacked(packed, range(103), 1024), weight):
        return False
    found = kernel.product(packed, bias, weight.shape)(rows)
    return torch.allclose(found, nn.functional.linear(rows, weight, bias), atol=1e-3)


def can_compile() -> bool:
    """Return whether the compiled product is there and right."""
    return linear_kernel(torch.float32) is not None


class CompiledLinear(FrozenLinear):
    """A frozen linear layer over its packed weight; rows and outputs are float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self.stored, self._kernel, packed = _shortest(weight)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self._product = self._kernel.product(packed, bias, weight.shape)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply on the CPU."""
        return self._product(hidden)

    def dense(self) -> Iterator[torch.Tensor]:
        """Unpack the weight."""
        for outputs in blocks_of(self.weight.shape, self._kernel.panel):
            yield self._kernel.unpacked(self.packed, outputs, self.weight.shape[1])


def _shortest(weight: torch.Tensor) -> tuple[torch.dtype, LinearKernel, torch.Tensor]:
    """Return the first dtype of `STORED` that holds all of a weight's numbers, its kernel, and the weight, packed."""
    some = weight[:1]
    for stored in STORED:
        if not torch.equal(some.to(stored).float(), some):  # a look, before a kernel is compiled that nobody needs
            continue
        kernel = linear_kernel(stored)
        packed = None if kernel is None else kernel.packed(weight)
        if kernel is not None and packed is not None:
            return stored, kernel, packed
    raise RuntimeError("the kernel of linear layers is not compiled")


def _empty_in_huge_pages(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return room for numbers; where the system lets, in pages of 2 MiB, which stream a third faster."""
    room = torch.empty(count, dtype=dtype)
    first = -(-room.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (room.data_ptr() + room.nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
    if length > 0 and hasattr(mmap, "MADV_HUGEPAGE"):  # advice: where it is refused, nothing is lost
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(first, length, mmap.MADV_HUGEPAGE)
    return room
