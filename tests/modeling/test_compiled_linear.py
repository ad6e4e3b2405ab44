"""The compiled linear layer: torch's numbers, its gradient, and bits that depend on nobody else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from promptd.modeling.compiled_linear import CompiledLinear, can_compile

pytestmark = pytest.mark.usefixtures("compiler")


def layer(num_outputs: int, num_inputs: int, *, has_bias: bool = True) -> CompiledLinear:
    """A random layer."""
    generator = torch.Generator().manual_seed(num_outputs)
    weight, bias = (
        torch.randn(num_outputs, num_inputs, generator=generator),
        torch.randn(num_outputs, generator=generator),
    )
    assert can_compile()
    return CompiledLinear(weight, bias if has_bias else None)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(97, 130), (48, 256), (1, 1), (147, 1024), (64, 2049)])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 33, 400])
def test_it_equals_torchs(num_outputs: int, num_inputs: int, num_rows: int) -> None:
    """Outputs that fill panels and not, inputs that fill blocks and not, few rows and more than a part takes."""
    for has_bias in (True, False):
        compiled = layer(num_outputs, num_inputs, has_bias=has_bias)
        rows = torch.randn(num_rows, num_inputs)
        expected = nn.functional.linear(
            rows.double(), compiled.weight.double(), None if compiled.bias is None else compiled.bias.double()
        )
        torch.testing.assert_close(compiled(rows).double(), expected, atol=1e-5 * num_inputs**0.5, rtol=1e-5)


def test_rows_need_not_lie_together() -> None:
    """Columns of something wider, and several leading dimensions."""
    compiled = layer(97, 130)
    wide = torch.randn(2, 5, 200)
    expected = nn.functional.linear(wide[..., 10:140], compiled.weight, compiled.bias)
    torch.testing.assert_close(compiled(wide[..., 10:140]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_inputs", [130, 1024])
def test_bits_depend_on_nobody_else(num_inputs: int) -> None:
    """A row's bits are the same alone and among any number of others, wherever it stands."""
    compiled = layer(97, num_inputs)
    rows = torch.randn(400, num_inputs)
    together = compiled(rows)
    for count in (1, 2, 5, 8, 13, 64, 193):
        assert torch.equal(compiled(rows[:count]), together[:count])
        assert torch.equal(compiled(rows[-count:]), together[-count:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_in_its_row(bad: float) -> None:
    """A fault in one row reaches all of its outputs and no other row."""
    compiled = layer(97, 130)
    rows = torch.randn(20, 130)
    clean = compiled(rows)
    rows[7, 60] = bad
    found = compiled(rows)
    assert not found[7].isfinite().any()
    others = [row for row in range(20) if row != 7]
    assert torch.equal(found[others], clean[others])


def test_the_gradient_passes() -> None:
    """Backward gives what torch's layer gives."""
    compiled = layer(97, 130)
    rows = torch.randn(5, 130, requires_grad=True)
    grads = torch.randn(5, 97)
    (found,) = torch.autograd.grad(compiled(rows), rows, grads)
    (expected,) = torch.autograd.grad(nn.functional.linear(rows, compiled.weight, compiled.bias), rows, grads)
    torch.testing.assert_close(found, expected)
