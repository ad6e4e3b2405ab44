"""The compiled GELU: torch's numbers, the same bits at every place, and torch's own where a gradient is wanted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from promptd.modeling import activations
from promptd.modeling.activations import Gelu, fuse_activations

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 40_007])
def test_it_equals_torchs(count: int) -> None:
    """Near zero, where it bends, and far out."""
    assert activations._kernel(torch.float32) is not None
    for spread in (1e-3, 1.0, 20.0):
        numbers = spread * torch.randn(count)
        expected = nn.functional.gelu(numbers.double(), approximate="tanh")
        torch.testing.assert_close(Gelu()(numbers).double(), expected, atol=1e-6, rtol=2e-6)


def test_bits_depend_on_no_place() -> None:
    """A number gives the same bits wherever it stands, also at an end that fills no vector."""
    numbers = torch.randn(1000)
    together = Gelu()(numbers)
    for first in (1, 7, 990):
        assert torch.equal(Gelu()(numbers[first:].clone()), together[first:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_so(bad: float) -> None:
    """And no neighbour is touched."""
    numbers = torch.randn(40)
    clean = Gelu()(numbers)
    numbers[17] = bad
    found = Gelu()(numbers)
    assert not found[17].isfinite()
    assert torch.equal(found.isfinite(), torch.arange(40) != 17) and torch.equal(found[:17], clean[:17])


def test_gradients_are_torchs() -> None:
    """Where a gradient is wanted torch computes."""
    numbers = torch.randn(40, requires_grad=True)
    (found,) = torch.autograd.grad(Gelu()(numbers).sum(), numbers)
    (expected,) = torch.autograd.grad(nn.functional.gelu(numbers, approximate="tanh").sum(), numbers)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 40_007])
def test_bfloat16_is_rounded_once(count: int) -> None:
    """torch's tanh form of it does the same; transformers' six steps are farther from the exact numbers."""
    assert activations._kernel(torch.bfloat16) is not None
    for spread in (1e-3, 1.0, 20.0):
        numbers = (spread * torch.randn(count, generator=torch.Generator().manual_seed(count))).bfloat16()
        exact = nn.functional.gelu(numbers.double(), approximate="tanh")
        found = Gelu()(numbers)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=2**-8)
        steps = NewGELUActivation()(numbers)
        assert count < 1000 or (found - exact).abs().sum() < (steps - exact).abs().sum()


def test_of_which_models(tiny_models: dict[str, Path]) -> None:
    """Of all layers in float32 and bfloat16; float16 keeps transformers' own."""
    model = GPT2LMHeadModel.from_pretrained(tiny_models["gpt2"])
    assert fuse_activations(model.half()) == 0
    assert fuse_activations(model.bfloat16()) == model.config.n_layer
    assert fuse_activations(GPT2LMHeadModel.from_pretrained(tiny_models["gpt2"]).float()) == model.config.n_layer
