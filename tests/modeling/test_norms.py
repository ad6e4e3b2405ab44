"""The compiled RMS norm: torch's numbers, bits that depend on nobody else, and only norms that are the same."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5EncoderModel

from promptd.modeling import norms
from promptd.modeling.norms import RmsNorm, fuse_norms

pytestmark = pytest.mark.usefixtures("compiler")


def make(dim: int, dtype: torch.dtype = torch.float32) -> RmsNorm:
    """A norm with random weights, as they are in a loaded model."""
    assert norms._kernel(dtype) is not None
    weight = torch.randn(dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    return RmsNorm(nn.Parameter(weight, requires_grad=False), 1e-6)


@pytest.mark.parametrize("dim", [1, 15, 16, 64, 77, 896])
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 40), (2, 3, 5)])
def test_it_equals_torchs(dim: int, shape: tuple[int, ...]) -> None:
    """Rows that fill vectors and not, of small and large numbers, and several leading dimensions."""
    norm = make(dim)
    for spread in (1e-4, 1.0, 1e4):
        rows = spread * torch.randn(*shape, dim)
        expected = nn.functional.rms_norm(rows.double(), (dim,), norm.weight.double(), 1e-6)
        torch.testing.assert_close(norm(rows).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [1, 15, 16, 64, 77, 896])
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_bfloat16_is_transformers(dim: int, num_rows: int) -> None:
    """It is rounded where transformers rounds: all but a few numbers, whose float32 quotient differs, have its bits."""
    norm, theirs = make(dim, torch.bfloat16), LlamaRMSNorm(dim, eps=1e-6).bfloat16()
    theirs.weight.data = norm.weight.data
    for spread in (1e-4, 1.0, 1e4):
        rows = (spread * torch.randn(num_rows, dim)).bfloat16()
        found, expected = norm(rows), theirs(rows)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found, expected, atol=0, rtol=2**-6)
        assert (found != expected).float().mean() < 0.01 or not num_rows


def test_gradients_of_bfloat16_are_torchs() -> None:
    """To within its rounding."""
    norm, rows = make(40, torch.bfloat16), torch.randn(3, 40).bfloat16().requires_grad_()
    want = torch.randn(3, 40).bfloat16()
    (found,) = torch.autograd.grad((norm(rows) * want).sum(), rows)
    exact = rows.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        (nn.functional.rms_norm(exact, (40,), norm.weight.double(), 1e-6) * want.double()).sum(), exact
    )
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=2**-6, rtol=2**-6)


def test_rows_need_not_lie_together() -> None:
    """Some heads of wider rows, say."""
    norm, wide = make(64), torch.randn(2, 5, 200)
    torch.testing.assert_close(norm(wide[..., 10:74]), norm(wide[..., 10:74].contiguous()), atol=0, rtol=0)


def test_bits_depend_on_nobody_else() -> None:
    """Alone and among others, on one thread and on several; what is not a number stays in its row."""
    norm, rows = make(896), torch.randn(400, 896)
    together = norm(rows)
    for first in (0, 1, 399):
        assert torch.equal(norm(rows[first : first + 1]), together[first : first + 1])
    rows[7, 5] = math.nan
    found = norm(rows)
    assert found[7].isnan().all() and torch.equal(found[8:], together[8:]) and torch.equal(found[:7], together[:7])


@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    """And the numbers have the same bits as without a gradient."""
    norm, rows = make(40), torch.randn(*shape, 40, requires_grad=True)
    normal = norm(rows)
    assert torch.equal(normal, norm(rows.detach()))
    want = torch.randn(*shape, 40)
    (found,) = torch.autograd.grad((normal * want).sum(), rows)
    exact = rows.detach().double().requires_grad_()
    expected = nn.functional.rms_norm(exact, (40,), norm.weight.double(), 1e-6)
    (expected,) = torch.autograd.grad((expected * want.double()).sum(), exact)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_weight_that_learns_is_torchs() -> None:
    """As in a full fine-tuning."""
    norm, rows = RmsNorm(nn.Parameter(torch.ones(40)), 1e-6), torch.randn(3, 40)
    (found,) = torch.autograd.grad(norm(rows).square().sum(), norm.weight)
    assert found.abs().min() > 0


def test_only_the_same_norms_are_replaced() -> None:
    """Llama's and T5's are; Gemma's adds one to its weight and is not; nor is float16."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    gemma = GemmaForCausalLM(GemmaConfig(**sizes, num_key_value_heads=2, head_dim=8, num_hidden_layers=2))
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_heads=4, num_layers=2))
    for model in (llama, gemma, t5):
        model.requires_grad_(requires_grad=False)
    assert fuse_norms(llama.half()) == 0
    assert fuse_norms(copy.deepcopy(llama).bfloat16()) == 5
    assert [fuse_norms(model) for model in (llama.float(), gemma, t5)] == [5, 0, 5]
