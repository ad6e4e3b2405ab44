"""The CPU's attention of texts in float32, by `kernels/prefill_attention.c`; torch's where that cannot be.

Torch's takes its products from a BLAS that packs each operand anew, and reaches a third of what the processor can.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from promptd.modeling.attention import Pair, flash_cpu
from promptd.modeling.kernels import load_kernel

PREFILL_ATTENTION = "prefill_attention.c"
_DIM = 64
"""Heads' sizes are multiples of it; of other sizes torch's serves."""
_FEW = 8
"""Fewer tokens are not worth turning keys around for."""
Attended = Pair


class _Layer(ctypes.Structure):
    """`layer` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "log_sums")),
        *(
            (f"{name}_{what}_stride", ctypes.c_int64)
            for name in ("query", "key", "value")
            for what in ("head", "token")
        ),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "num_queries", "num_keys", "dim")),
        ("scale", ctypes.c_float),
        ("is_causal", ctypes.c_int64),
    ]


class PrefillKernel:
    """The compiled function."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.promptd_prefill_attention
        self._attend.argtypes = [ctypes.POINTER(_Layer), ctypes.c_int64]
        self._attend.restype = ctypes.c_int

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, is_causal: bool
    ) -> Attended:
        """See `attend_text`; all float32, on the CPU. Raises `MemoryError`."""
        query, keys, values = (each if each.stride(3) == 1 else each.contiguous() for each in (query, keys, values))
        _, num_heads, num_queries, dim = query.shape
        out = query.new_empty(1, num_queries, num_heads, dim)
        log_sums = query.new_empty(1, num_heads, num_queries)
        layer = _Layer(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), log_sums.data_ptr(),
            *(stride for each in (query, keys, values) for stride in each.stride()[1:3]),
            num_heads, keys.shape[1], num_queries, keys.shape[2], dim,
            scale, is_causal,
        )  # fmt: skip
        if self._attend(layer, torch.get_num_threads()):
            raise MemoryError("no memory for the attention of a text")
        return out.transpose(1, 2), log_sums


def attend_text(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, is_causal: bool = False
) -> Attended:
    """Attend tokens `[1, num_heads, num_queries, head_dim]` to keys `[1, num_kv_heads, num_keys, head_dim]` on the CPU.

    Returns that and its log-sum-exps `[1, num_heads, num_queries]`. `is_causal` where the keys are the tokens' own:
    each sees those up to itself.
    """
    if query.dtype is torch.float32 and query.shape[2] >= _FEW and query.shape[3] % _DIM == 0:
        kernel = prefill_kernel()
        if kernel is not None:
            return kernel.attend(query, keys, values, scale=scale, is_causal=is_causal)
    return flash_cpu(query, keys, values, is_causal=is_causal, scale=scale)


@functools.cache
def prefill_kernel() -> PrefillKernel | None:
    """Return the kernel, or None where it cannot be had; the log says why."""
    return load_kernel(PREFILL_ATTENTION, bind=PrefillKernel, passes=_passes)


def _passes(kernel: PrefillKernel) -> bool:
    """Whether more tokens than a block holds come out as by plain products: their own keys, and others."""
    generator = torch.Generator().manual_seed(0)
    for num_keys, is_causal in ((200, True), (70, False)):
        query, keys, values = (
            torch.randn(1, heads, count, 64, generator=generator)
            for heads, count in ((4, 200), (2, num_keys), (2, num_keys))
        )
        found, log_sums = kernel.attend(query, keys, values, scale=0.1, is_causal=is_causal)
        scores = query @ keys.repeat_interleave(2, 1).transpose(-1, -2) * 0.1
        if is_causal:
            scores.masked_fill_(torch.ones(200, 200, dtype=torch.bool).triu(1), float("-inf"))
        expected = scores.softmax(-1) @ values.repeat_interleave(2, 1)
        if not torch.allclose(found, expected, atol=1e-5) or not torch.allclose(
            log_sums, scores.logsumexp(-1), atol=1e-5
        ):
            return False
    return True
