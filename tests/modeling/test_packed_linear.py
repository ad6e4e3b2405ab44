"""Packed weights: the same numbers, the same gradients, and in strict mode the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from promptd.modeling import FrozenModel, load_model
from promptd.modeling.packed_linear import PackedLinear, can_pack
from promptd.training import forward_texts

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this build of torch has no packed products")


def layer(*, pack: bool, tile_rows: int = 0) -> PackedLinear:
    """A layer of an odd size."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(97, 130, generator=generator), torch.randn(97, generator=generator)
    return PackedLinear(weight, bias, pack=pack, tile_rows=tile_rows)


@needs_packing
@pytest.mark.parametrize("num_rows", [1, 3, 16, 33])
def test_packed_equals_plain(num_rows: int) -> None:
    """The packed product equals torch's linear at any number of rows."""
    packed = layer(pack=True)
    rows = torch.randn(1, num_rows, 130)
    expected = nn.functional.linear(rows, packed.plain, packed.bias)
    torch.testing.assert_close(packed(rows), expected, atol=1e-4, rtol=1e-4)


@needs_packing
def test_a_prompts_gradient_passes_packed_layers(tiny_models: dict[str, Path]) -> None:
    """The gradient of a soft prompt through packed linears equals the one through plain linears, and is not zero."""
    gradients = []
    for packed in (True, False):
        model: FrozenModel = load_model(tiny_models["gpt2"], packed_linears=packed)
        embeds = model.embed(torch.arange(5, 12)).clone().requires_grad_()
        logits = forward_texts(model, embeds, [(12,)], torch.tensor([0]))
        torch.log_softmax(logits, -1)[-1, 7].backward()
        gradients.append(embeds.grad)
        assert all(parameter.grad is None for parameter in model.hf.parameters())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


@needs_packing
def test_the_bare_product_has_no_gradient() -> None:
    """Control: without our own backward the gradient is silently missing."""
    packed = layer(pack=True)
    rows = torch.randn(2, 130, requires_grad=True)
    bare = torch.ops.mkldnn._linear_pointwise(rows, packed._packed, packed.bias, "none", [], "")
    assert "NotImplemented" in bare.grad_fn.name()


@pytest.mark.parametrize("pack", [True, False])
def test_tiles_make_rows_independent(pack: bool) -> None:
    """Strict mode: a row's bits are the same alone and among any number of others."""
    strict = layer(pack=pack and can_pack(torch.float32), tile_rows=16)
    rows = torch.randn(50, 130)
    together = strict(rows)
    for count in (1, 2, 7, 16, 17):
        assert torch.equal(strict(rows[:count]), together[:count])
