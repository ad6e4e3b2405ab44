"""8-bit products: near the plain ones, the same bits beside any neighbours, gradients, and what a model loses."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from promptd.errors import ModelRefusedError
from promptd.modeling import frozen_linear, integer_product, load_model, quantized_linear
from promptd.modeling.fingerprint import digest_of_tensors
from promptd.modeling.integer_product import CompiledProduct, OneDnnProduct
from promptd.modeling.quantized_linear import QuantizedLinear, can_quantize
from promptd.training import forward_texts

pytestmark = pytest.mark.skipif(not can_quantize(), reason="this build of torch has no 8-bit products")


def weight_and_bias(in_features: int = 130) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a layer of an odd size."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(97, in_features, generator=generator), torch.randn(97, generator=generator)


def layer(in_features: int = 130) -> QuantizedLinear:
    """It."""
    return QuantizedLinear(*weight_and_bias(in_features))


@pytest.mark.parametrize("num_rows", [1, 3, 16, 33])
def test_near_the_plain_product(num_rows: int) -> None:
    """Within 2 % of the largest output, for rows of very different sizes, each measured by itself."""
    quantized = layer()
    rows = torch.randn(num_rows, 130) * torch.logspace(-3, 3, num_rows).unsqueeze(1)
    expected = nn.functional.linear(rows, weight_and_bias()[0])
    found = quantized(rows) - quantized.bias
    assert ((found - expected).abs().amax(1) <= 0.02 * expected.abs().amax(1) + 1e-6).all()


def test_one_scale_for_all_rows_would_lose_the_small_ones() -> None:
    """The control: with one scale for the batch, a row beside one that is a million times larger is lost."""
    quantized = layer()
    rows = torch.randn(2, 130) * torch.tensor([[1.0], [1e6]])
    expected = nn.functional.linear(rows[:1], weight_and_bias()[0])
    integers = (rows / rows.abs().max() * 127).round() / 127 * rows.abs().max()
    shared = nn.functional.linear(integers[:1], weight_and_bias()[0])
    assert (shared - expected).abs().max() > 0.5 * expected.abs().max()
    assert (quantized(rows)[:1] - quantized.bias - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("width", [256, 258], ids=["ours", "oneDNN"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(width: int) -> None:
    """Alone, among others, and beside a row that is not finite."""
    quantized = layer(width)
    rows = torch.randn(40, width)
    rows[39, 0] = float("nan")
    together = quantized(rows)
    for count in (1, 2, 7, 16, 17, 39):
        assert torch.equal(quantized(rows[:count]), together[:count])
        assert torch.equal(quantized(rows[39 - count : 39]), together[39 - count : 39])
    assert not together[39].isfinite().any() and together[:39].isfinite().all()


@pytest.mark.parametrize("width", [256, 258])
def test_nobody_keeps_the_weight_that_was_given(width: int) -> None:
    """Neither the layer nor its product."""
    given = weight_and_bias(width)[0].clone()
    gone = weakref.ref(given)
    kept = QuantizedLinear(given, None)
    del given
    assert gone() is None and kept.weight.shape == (97, width)


def test_what_is_served_has_a_digest() -> None:
    """Of weights that differ in their scale alone, too."""
    weight, _ = weight_and_bias(256)
    once, five = (dict(QuantizedLinear(factor * weight, None).named_parameters()) for factor in (1, 5))
    assert digest_of_tensors(once) != digest_of_tensors(five)


def test_a_weight_is_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a number; what gradients pass is what is multiplied with, unpacked in one block or in many."""
    for block_numbers in (1 << 22, 1):
        monkeypatch.setattr(frozen_linear, "BLOCK_NUMBERS", block_numbers)
        for width in (256, 258):
            weight, _ = weight_and_bias(width)
            quantized = layer(width)
            assert sum(one.nbytes for one in quantized.parameters()) <= 144 * width + 2 * 4 * 97  # scales, bias
            served = torch.cat(list(quantized.dense()))
            assert (served - weight).abs().max() <= 0.501 * weight.abs().max() / 127
            rows = torch.randn(3, width, requires_grad=True)
            grads = torch.randn(3, 97)
            (found,) = torch.autograd.grad(quantized(rows), rows, grads)
            torch.testing.assert_close(found, grads @ served, atol=1e-4, rtol=1e-4)


def test_rows_of_zeros_give_the_bias() -> None:
    """A row without a largest magnitude is no division by zero."""
    quantized = layer()
    assert torch.equal(quantized(torch.zeros(2, 130)), quantized.bias.expand(2, -1))


def test_a_prompts_gradient_passes(tiny_models: dict[str, Path]) -> None:
    """The gradient of a soft prompt is near the one through plain linears, and no weight has one."""
    gradients = []
    for quantization in ("int8", "none"):
        model = load_model(tiny_models["llama"], quantization=quantization)
        embeds = model.embed(torch.arange(5, 12)).clone().requires_grad_()
        logits = forward_texts(model, embeds, [(12,)], torch.tensor([0]))
        torch.log_softmax(logits, -1)[-1, 7].backward()
        assert embeds.grad is not None
        gradients.append(embeds.grad.flatten())
        assert all(parameter.grad is None for parameter in model.hf.parameters())
    assert torch.cosine_similarity(gradients[0], gradients[1], 0) > 0.98


def test_a_quantized_model_is_near_itself_and_the_same_model(tiny_models: dict[str, Path]) -> None:
    """Its answers are near the exact ones, and not equal; its fingerprint, and so its prompts, are the same."""
    exact, quantized = (load_model(tiny_models["gpt2"], quantization=one) for one in ("none", "int8"))
    assert quantized.spec.fingerprint == exact.spec.fingerprint
    logits = [forward_texts(model, None, [tuple(range(5, 30))], torch.arange(25)) for model in (exact, quantized)]
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < error < 0.05


def test_what_cannot_be_is_refused(tiny_models: dict[str, Path]) -> None:
    """Another name is an error that says which there are."""
    with pytest.raises(ModelRefusedError, match="none, int8"):
        load_model(tiny_models["gpt2"], quantization="int4")


@pytest.mark.parametrize("width", [1, 15, 16, 130, 768])
@pytest.mark.usefixtures("compiler")
def test_the_compiled_rounding_is_torchs(width: int) -> None:
    """Rows become the same integers and sizes, but for one step of rounding."""
    kernel = quantized_linear._kernel()
    assert kernel is not None
    rows = torch.randn(50, width) * torch.logspace(-3, 3, 50).unsqueeze(1)
    rows[7] = 0.0
    (integers, sizes), (expected, wanted) = (quantized_linear._quantized(one, rows) for one in (kernel, None))
    assert torch.equal(sizes, wanted)
    assert (integers.int() - expected.int()).abs().max() <= 1 and (integers != expected).float().mean() < 0.01


@pytest.mark.parametrize("num_rows", [1, 8, 9, 17, 200, 401])
@pytest.mark.parametrize("shape", [(48, 4), (1, 36), (131, 900)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.usefixtures("compiler")
def test_both_products_are_exact(num_rows: int, shape: tuple[int, int], has_bias: bool) -> None:
    """Ours and oneDNN's are the integers' sums, scaled; the largest integers overflow nothing."""
    if not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no AVX-512 VNNI")
    kernel = integer_product._kernel()
    assert kernel is not None
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    rows = torch.randint(0, 256, (num_rows, shape[1]), generator=generator, dtype=torch.uint8)
    weight[0], rows[0] = 127, 255
    scales, sizes = torch.rand(shape[0], generator=generator), torch.rand(num_rows, 1, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if has_bias else None
    wanted = (rows.double() - 128) @ weight.double().t() * scales * sizes + (0 if bias is None else bias)
    for product in (CompiledProduct(weight, scales, bias, 128, kernel), OneDnnProduct(weight, scales, bias, 128)):
        torch.testing.assert_close(product(rows, sizes).double(), wanted, rtol=1e-5, atol=1e-3)


def test_inputs_that_no_instruction_takes_go_to_onednn(compiler: None) -> None:
    """A number of inputs that is not a multiple of four; the control is one that is."""
    assert isinstance(layer(130)._multiplied, OneDnnProduct)
    assert isinstance(layer(132)._multiplied, CompiledProduct) == torch.cpu._is_vnni_supported()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 40])
@pytest.mark.parametrize("width", [41, 44], ids=["oneDNN", "ours"])
@pytest.mark.usefixtures("compiler")
def test_what_is_not_a_number_shows_in_its_row(bad: float, place: int, width: int) -> None:
    """Wherever in a row it stands, also at an end that fills no vector."""
    quantized = layer(width)
    rows = torch.randn(5, width)
    clean = quantized(rows)
    rows[2, place] = bad
    found = quantized(rows)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])
