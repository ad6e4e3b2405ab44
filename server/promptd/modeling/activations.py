"""GPT-2's GELU in one kernel instead of six elementwise ops."""

from __future__ import annotations

import ctypes
import functools
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from promptd.modeling.kernels import NUMBERS, load_kernel
from promptd.modeling.recording import opaque

GELU = "gelu.c"


class Gelu(nn.Module):
    """The tanh form; equal to transformers' to 1e-6. By `kernels/gelu.c` where it can be, else by torch.

    In bfloat16 it is computed in float32 and rounded once, where transformers rounds after each of six steps.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map each number."""
        wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
        is_plain = hidden.device.type == "cpu" and hidden.is_contiguous()
        kernel = _kernel(hidden.dtype) if is_plain and not wants_gradient else None
        if kernel is None:
            return nn.functional.gelu(hidden, approximate="tanh")
        return opaque(_run, kernel, hidden)


def _run(kernel: ctypes._NamedFuncPointer, hidden: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(hidden)
    kernel(hidden.data_ptr(), out.data_ptr(), hidden.numel(), torch.get_num_threads())
    return out


@functools.cache
def _kernel(dtype: torch.dtype) -> ctypes._NamedFuncPointer | None:
    """Return the compiled function for numbers of this dtype, where it can be had and is right."""
    if dtype not in NUMBERS:
        return None
    return load_kernel(GELU, *NUMBERS[dtype], bind=_bound, passes=partial(_passes, dtype=dtype))


def _bound(library: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    library.promptd_gelu.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.promptd_gelu.restype = None
    return library.promptd_gelu


def _passes(kernel: ctypes._NamedFuncPointer, dtype: torch.dtype) -> bool:
    trial = torch.linspace(-12, 12, 1001).to(dtype)
    out = torch.empty_like(trial)
    kernel(trial.data_ptr(), out.data_ptr(), trial.numel(), 1)
    wanted = nn.functional.gelu(trial.float(), approximate="tanh")
    return torch.allclose(out.float(), wanted, atol=1e-6, rtol=1e-5 if dtype is torch.float32 else 2**-8)


def fuse_activations(model: PreTrainedModel) -> int:
    """Replace GPT-2's GELU in a model of float32 or bfloat16, and return how many there were."""
    if model.dtype not in NUMBERS:
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, Gelu())
                count += 1
    return count
