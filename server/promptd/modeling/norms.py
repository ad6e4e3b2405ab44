"""RMS norms in one kernel instead of six elementwise ops."""

from __future__ import annotations

import ctypes
import functools
from functools import partial
from typing import Any

import torch
from torch import nn

from promptd.modeling.kernels import NUMBERS, load_kernel
from promptd.modeling.recording import opaque

RMS_NORM = "rms_norm.c"
_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""bfloat16 is rounded twice."""


class RmsNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight` (Zhang and Sennrich, 2019); equal to transformers' to 1e-6.

    In bfloat16 sums are float32, and the quotient is rounded, as in transformers. By `kernels/rms_norm.c` where it can
    be, else by torch.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight  # [hidden_size]
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        is_learned = torch.is_grad_enabled() and self.weight.requires_grad
        if is_learned or hidden.dtype is not self.weight.dtype or _kernel(hidden.dtype) is None:
            return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)
        if torch.is_grad_enabled() and hidden.requires_grad:
            normal: torch.Tensor = _Normal.apply(hidden, self)  # type: ignore[no-untyped-call]
            return normal
        return opaque(self.normalize, hidden)

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the kernel; no gradient is asked for."""
        kernel = _kernel(hidden.dtype)
        if kernel is None:
            raise RuntimeError("the kernel of norms is not compiled")
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        (dim,) = self.weight.shape
        kernel(
            hidden.data_ptr(), self.weight.data_ptr(), out.data_ptr(), hidden.numel() // dim, dim, self.epsilon,
            torch.get_num_threads(),
        )  # fmt: skip
        return out


class _Normal(torch.autograd.Function):
    """The same bits where a gradient passes, so that a row's do not depend on who learns beside it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.norm = norm
        return norm.normalize(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        hidden = ctx.saved_tensors[0].float()
        scaled = (grads[0] * ctx.norm.weight).float()
        factor = (hidden.square().mean(-1, keepdim=True) + ctx.norm.epsilon).rsqrt()
        along = (scaled * hidden).mean(-1, keepdim=True)
        return (factor * scaled - hidden * (along * factor**3)).to(grads[0].dtype), None


@functools.cache
def _kernel(dtype: torch.dtype) -> ctypes._NamedFuncPointer | None:
    """Return the compiled function for rows of this dtype, where it can be had and is right."""
    if dtype not in NUMBERS:
        return None
    return load_kernel(RMS_NORM, *NUMBERS[dtype], bind=_bound, passes=partial(_passes, dtype=dtype))


def _bound(library: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.promptd_rms_norm.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_float, number]
    library.promptd_rms_norm.restype = None
    return library.promptd_rms_norm


def _passes(kernel: ctypes._NamedFuncPointer, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    trial, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 77), (77,)))
    out = torch.empty_like(trial)
    kernel(trial.data_ptr(), weight.data_ptr(), out.data_ptr(), 3, 77, 1e-5, 1)
    wanted = nn.functional.rms_norm(trial.float(), (77,), weight.float(), 1e-5)
    return torch.allclose(out.float(), wanted, atol=1e-5, rtol=_RTOL[dtype])


@torch.no_grad()
def fuse_norms(model: nn.Module) -> int:
    """Replace every norm that computes this on the CPU, and return how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (fused := _fused(child)) is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _fused(norm: nn.Module) -> RmsNorm | None:
    """Return the same norm, where it is one: classes of this name differ in what they do with their weight."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    is_named_so = type(norm).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if not is_named_so or not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
        return None
    if weight.device.type != "cpu" or weight.dtype not in _RTOL or weight.dim() != 1:
        return None
    trial = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    fused = RmsNorm(weight, epsilon)
    scale = weight.abs().max().item()
    return (
        fused
        if torch.allclose(fused(trial), norm(trial), rtol=_RTOL[weight.dtype], atol=1e-6 * max(scale, 1.0))
        else None
    )
