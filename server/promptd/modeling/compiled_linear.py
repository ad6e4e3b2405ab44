"""Linear layers in float32 or bfloat16 by `kernels/linear.c`, on the CPU.

A decode step is bound by how fast weights come from memory: this product streams them at the speed of the memory, from
huge pages, where oneDNN's reaches two thirds of it for one row; for many rows it is as fast. A row's bits do not
depend on its neighbours.

Most checkpoints hold 16-bit numbers. A weight all of whose numbers are such is packed in 16 bits and widened in
registers: the same product, bit for bit, from half the memory. A bfloat16 model's rows are bfloat16, too: where the
processor has an instruction that multiplies them in pairs, many rows take half the time; sums are float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator

import torch
from torch import nn

from promptd.modeling.frozen_linear import FrozenLinear, blocks_of
from promptd.modeling.kernels import NUMBERS, load_kernel

LINEAR, LINEAR_GRADIENT = "linear.c", "linear_gradient.c"
FEW_ROWS = 64
"""So many rows' gradients pass the packed weight as it is; for more it is unpacked."""
STORED = {torch.bfloat16: "STORED_BFLOAT16", torch.float16: "STORED_FLOAT16", torch.float32: "STORED_FLOAT32"}
"""Dtypes that weights are packed in, the first one that loses nothing, and what the source calls them."""
PAIRS_OF_BFLOAT16 = "PAIRS_OF_BFLOAT16"
"""What it calls the instruction for rows of bfloat16, whose weights are bfloat16, too."""
Product = Callable[[torch.Tensor], torch.Tensor]
_HUGE_PAGE = 2 << 20


class LinearKernel:
    """The compiled functions for rows of one dtype and weights that are packed in one dtype."""

    def __init__(self, library: ctypes.CDLL, stored: torch.dtype, rows: torch.dtype) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.promptd_linear_panel.restype = number
        self.panel: int = library.promptd_linear_panel()
        self.rows = rows
        """Dtype of what is multiplied, and of the outputs."""
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
        """Pack a weight `[out_features, in_features]`, float32 or bfloat16; None where that would lose a bit of it."""
        num_outputs, num_inputs = weight.shape
        if not self.takes(num_inputs):
            return None
        room = _empty_in_huge_pages(-(-num_outputs // self.panel) * self.panel * num_inputs, self.dtype)
        for outputs in blocks_of(weight.shape, self.panel):  # one block of a bfloat16 weight is widened at a time
            block, to = weight[outputs.start : outputs.stop].float(), room[outputs.start * num_inputs :]
            is_whole = self._pack(
                block.data_ptr(), *block.stride(), *block.shape, to.data_ptr(), torch.get_num_threads()
            )
            if not is_whole:
                return None
        return room

    def takes(self, num_inputs: int) -> bool:
        """Return whether so many inputs can be packed: bfloat16 lie in pairs."""
        return self.dtype is torch.float32 or num_inputs % 2 == 0

    def unpacked(self, packed: torch.Tensor, outputs: range, num_inputs: int) -> torch.Tensor:
        """Return the rows of some outputs, `[len(outputs), in_features]`, float32; the first one begins a panel."""
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
        multiply, dtype, weight_at, bias_at = self._multiply, self.rows, packed.data_ptr(), filled.data_ptr()

        def product(hidden: torch.Tensor, _kept: tuple[torch.Tensor, torch.Tensor] = (packed, filled)) -> torch.Tensor:
            if hidden.shape[-1] != num_inputs or hidden.dtype is not dtype or not hidden.is_cpu:
                found = f"{hidden.shape[-1]} {hidden.dtype} on {hidden.device}"
                raise ValueError(f"a row is {num_inputs} {dtype} numbers on the CPU, not {found}")
            rows = hidden.contiguous()
            out = rows.new_empty((*rows.shape[:-1], num_outputs))
            multiply(
                rows.data_ptr(), rows.numel() // num_inputs, num_inputs, weight_at, bias_at, out.data_ptr(),
                num_outputs, torch.get_num_threads(),
            )  # fmt: skip
            return out

        return product


@functools.cache
def linear_kernel(stored: torch.dtype, rows: torch.dtype = torch.float32) -> LinearKernel | None:
    """Return the kernel for rows of a dtype and weights that are packed in one; None where it cannot be had."""
    defines = (STORED[stored], *NUMBERS[rows])
    if rows is torch.bfloat16 and _has_pairs():
        defines += (PAIRS_OF_BFLOAT16,)
    return load_kernel(LINEAR, *defines, bind=lambda library: LinearKernel(library, stored, rows), passes=_passes)


def _has_pairs() -> bool:
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _passes(kernel: LinearKernel) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, bias, rows = (torch.randn(*shape, generator=generator) for shape in ((103, 1024), (103,), (21, 1024)))
    weight = weight.bfloat16().half().float()  # what either holds
    packed = kernel.packed(weight)
    if packed is None or not torch.equal(kernel.unpacked(packed, range(103), 1024), weight):
        return False
    rows = rows.to(kernel.rows)
    found = kernel.product(packed, bias, weight.shape)(rows).float()
    wanted = nn.functional.linear(rows.float(), weight, bias)
    return torch.allclose(found, wanted, atol=1e-3, rtol=1e-5 if kernel.rows is torch.float32 else 2**-8)


class GradientKernel:
    """The compiled function by which few rows' gradients pass weights that are packed in one dtype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._pass = library.promptd_linear_gradient
        self._pass.argtypes = [pointer, number, number, pointer, pointer, number, number]
        self._pass.restype = ctypes.c_int

    def passed_back(self, grads: torch.Tensor, packed: torch.Tensor, num_inputs: int, panel: int) -> torch.Tensor:
        """Map `[num_rows, out_features]` to `[num_rows, in_features]`, both float32. Raises `MemoryError`."""
        filled = nn.functional.pad(grads, (0, -grads.shape[1] % panel)).contiguous()
        inputs = filled.new_empty(filled.shape[0], num_inputs)
        failed = self._pass(
            filled.data_ptr(), *filled.shape, packed.data_ptr(), inputs.data_ptr(), num_inputs, torch.get_num_threads()
        )
        if failed:
            raise MemoryError("no memory for a gradient")
        return inputs


@functools.cache
def gradient_kernel(stored: torch.dtype) -> GradientKernel | None:
    """Return the kernel for weights that are packed in this dtype; None where it cannot be had."""
    passes = functools.partial(_gradient_passes, stored=stored)
    return load_kernel(LINEAR_GRADIENT, STORED[stored], bind=GradientKernel, passes=passes)


def _gradient_passes(kernel: GradientKernel, stored: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, grads = (torch.randn(*shape, generator=generator) for shape in ((103, 78), (7, 103)))
    weight, forward = weight.to(stored).float(), linear_kernel(stored)
    packed = None if forward is None else forward.packed(weight)
    if forward is None or packed is None:
        return False
    return torch.allclose(kernel.passed_back(grads, packed, 78, forward.panel), grads @ weight, atol=1e-4)


def can_compile(dtype: torch.dtype, num_inputs: int = 2) -> bool:
    """Return whether the compiled product for rows of so many numbers of this dtype is there and right."""
    kernel = linear_kernel(dtype, dtype) if dtype in NUMBERS else None
    return kernel is not None and kernel.takes(num_inputs)


class CompiledLinear(FrozenLinear):
    """A frozen linear layer over its packed weight; rows and outputs are of the weight's dtype."""

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

    def passed_back(self, grads: torch.Tensor) -> torch.Tensor:
        """Do so by the kernel, where rows are few."""
        kernel = gradient_kernel(self.stored) if len(grads) <= FEW_ROWS else None
        if kernel is None:
            return super().passed_back(grads)
        inputs = kernel.passed_back(grads.float(), self.packed, self.weight.shape[1], self._kernel.panel)
        return inputs.to(grads.dtype)


def _shortest(weight: torch.Tensor) -> tuple[torch.dtype, LinearKernel, torch.Tensor]:
    """Return the first dtype of `STORED` that holds all of a weight's numbers, its kernel, and the weight, packed."""
    some = weight[:1].float()
    for stored in STORED if weight.dtype is torch.float32 else (weight.dtype,):
        again = some.to(stored).float()  # a look, before a kernel is compiled that nobody needs
        if not torch.equal(again.view(torch.int32), some.view(torch.int32)):
            continue
        kernel = linear_kernel(stored, weight.dtype)
        packed = None if kernel is None else kernel.packed(weight)
        if kernel is not None and packed is not None:
            return stored, kernel, packed
    raise RuntimeError("the kernel of linear layers is not compiled")


def _empty_in_huge_pages(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return room for numbers; where the system lets, in pages of 2 MiB, which stream a third faster.

    It is fresh memory: what was in use before lies in small pages.
    """
    size = count * dtype.itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    first = -room.data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # advice: where it is refused, nothing is lost
        memory.madvise(mmap.MADV_HUGEPAGE)
    return room[first : first + size].view(dtype)
