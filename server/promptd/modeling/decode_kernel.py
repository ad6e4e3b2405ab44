"""The CPU's decode attention in C, `kernels/decode_attention.c`.

Torch's attention is called once for every run of rows and every span of their keys; each call wakes all threads and
reads a few kilobytes at a third of the memory's speed. The kernel does a layer in one call. Where it cannot be
compiled, or does not pass its trial, torch's attention serves.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from promptd.modeling.kernels import NUMBERS, load_kernel
from promptd.modeling.shared_spans import Span, num_common, runs_of

MAX_HEAD_DIM = 256
MAX_RUN = 32
"""Rows with keys in common that one thread answers together."""
DECODE_ATTENTION = "decode_attention.c"
"""Dtypes that there is a kernel for, and what the source calls them."""
ALONE = 1 << 14
"""Fewer numbers than this are not worth waking other threads for."""
_NO_MEMORY = 1


class _Layer(ctypes.Structure):
    """`layer` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("query_head_stride", "query_token_stride", "num_slots")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim")),
        ("scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        ("reach", ctypes.c_int64),
    ]


class _Rows(ctypes.Structure):
    """`rows` of the source."""

    _fields_ = [("num_runs", ctypes.c_int64), ("max_rows", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("runs", "num_shared", "tokens", "first_spans", "spans")
    ]


class RowPlan:
    """Which spans a step's single tokens read; the same for all layers.

    `runs` are lists of `(token, spans)`: what all rows of a run begin with is read once for them.
    """

    def __init__(self, runs: Sequence[Sequence[tuple[int, Sequence[Span]]]]) -> None:
        rows = [row for run in runs for row in run]
        ends, starts = [0], [0]
        for run in runs:
            ends.append(ends[-1] + len(run))
        for _, spans in rows:
            starts.append(starts[-1] + len(spans))
        shared = [min((num_common(one, other) for (_, one), (_, other) in pairwise(run)), default=0) for run in runs]
        tokens = [token for token, _ in rows]
        slots = [number for _, spans in rows for span in spans for number in span]
        self._kept = [torch.tensor(numbers, dtype=torch.int64) for numbers in (ends, shared, tokens, starts, slots)]
        longest = max((len(run) for run in runs), default=0)
        self.struct = _Rows(len(runs), longest, *(numbers.data_ptr() for numbers in self._kept))

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Sequence[Span]]], num_kv_heads: int) -> RowPlan:
        """Make runs of neighbours that begin with the same keys, and enough of them that every thread has some."""
        rows = list(rows)
        most = max(1, min(MAX_RUN, len(rows) * num_kv_heads // (2 * torch.get_num_threads())))
        runs = [rows[run.first : run.end] for run in runs_of(spans for _, spans in rows)]
        return cls([run[at : at + most] for run in runs for at in range(0, len(run), most)])


class DecodeKernel:
    """The compiled functions for one dtype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._attend, self._store = library.promptd_decode_attention, library.promptd_store
        self._attend.argtypes = [ctypes.POINTER(_Layer), ctypes.POINTER(_Rows), number]
        self._store.argtypes = [pointer, number, number, pointer, number, number, number, pointer, number, number]
        self._attend.restype = self._store.restype = ctypes.c_int

    def store(self, into: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write `tokens` `[num_kv_heads, num_tokens, head_dim]` at `slots` `[num_tokens]`, int64.

        `into` is `[num_kv_heads, num_slots, head_dim]`, contiguous; both of one dtype. Raises `IndexError`.
        """
        if tokens.stride(2) != 1:
            tokens = tokens.contiguous()
        num_heads, num_slots, dim = into.shape
        failed = self._store(
            tokens.data_ptr(), tokens.stride(0), tokens.stride(1), into.data_ptr(), num_heads, num_slots, dim,
            slots.data_ptr(), slots.shape[0], torch.get_num_threads() if tokens.numel() > ALONE else 1,
        )  # fmt: skip
        if failed:
            raise IndexError("a slot is not in the K/V pool")

    def attend(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        plan: RowPlan,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Fill the plan's tokens of `out` `[1, num_tokens, num_heads, head_dim]`, contiguous.

        `query` is `[1, num_heads, num_tokens, head_dim]`; keys and values `[1, num_kv_heads, num_slots, head_dim]`,
        contiguous. All of one dtype, on the CPU. `bias` is what scores get for distances, as `PositionBias.behind`
        tells it. Raises `MemoryError`, and `IndexError` for a span outside the pool.
        """
        if query.stride(3) != 1:
            query = query.contiguous()
        layer = _Layer(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            query.stride(1), query.stride(2), keys.shape[2],
            query.shape[1], keys.shape[1], query.shape[3],
            scale, None if bias is None else bias.data_ptr(), 0 if bias is None else bias.shape[1] - 1,
        )  # fmt: skip
        failed = self._attend(layer, plan.struct, torch.get_num_threads())
        if failed == _NO_MEMORY:
            raise MemoryError("no memory for the attention of a step")
        if failed:
            raise IndexError("a span is not in the K/V pool")


def kernel_over(keys: torch.Tensor) -> DecodeKernel | None:
    """Return the kernel that attends to keys like these `[..., head_dim]`, or None where there is none."""
    return decode_kernel(keys.dtype) if keys.device.type == "cpu" and keys.shape[-1] <= MAX_HEAD_DIM else None


@functools.cache
def decode_kernel(dtype: torch.dtype) -> DecodeKernel | None:
    """Return the kernel for keys and values of this dtype, or None where it cannot be had; the log says why."""
    if dtype not in NUMBERS:
        return None
    passes = functools.partial(_passes, dtype=dtype)
    return load_kernel(DECODE_ATTENTION, *NUMBERS[dtype], bind=DecodeKernel, passes=passes)


def _passes(kernel: DecodeKernel, dtype: torch.dtype) -> bool:
    """Whether rows that share spans, and one that shares none, come out as by plain products, also with a bias."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, heads, count, 20, generator=generator).to(dtype) for heads, count in ((4, 5), (2, 200), (2, 200))
    )
    runs = [[(0, [(10, 70), (90, 1)]), (2, [(10, 70), (100, 65)])], [(1, [(7, 3)])]]
    runs.append([(3, [(20, 40), (110, 50), (5, 1)]), (4, [(20, 40), (110, 50), (170, 9)])])
    for bias in (None, torch.randn(4, 31, generator=generator)):
        out = torch.full((1, 5, 4, 20), math.nan, dtype=dtype)
        kernel.attend(out, query, keys, values, 0.3, RowPlan(runs), bias)
        for token, spans in (row for run in runs for row in run):
            own = torch.cat([torch.arange(start, start + length) for start, length in spans])
            key, value = (stored[:, :, own].repeat_interleave(2, 1).float() for stored in (keys, values))
            scores = query[:, :, token : token + 1].float() @ key.transpose(-1, -2) * 0.3
            if bias is not None:
                scores += bias[:, (torch.arange(-len(own), 0) + 31).clamp(min=0)].unsqueeze(1)
            expected = (scores.softmax(-1) @ value)[:, :, 0]
            if not torch.allclose(out[:, token].float(), expected, atol=2e-2 if dtype is torch.bfloat16 else 1e-5):
                return False
    return True
