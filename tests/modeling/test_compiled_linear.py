"""The compiled linear layer: torch's numbers, its gradient, and bits that depend on nobody else."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from promptd.errors import ModelRefusedError
from promptd.modeling import compiled_linear, frozen_linear, load_model
from promptd.modeling.compiled_linear import CompiledLinear, can_compile

pytestmark = pytest.mark.usefixtures("compiler")


def layer(
    num_outputs: int, num_inputs: int, *, has_bias: bool = True, stored: torch.dtype = torch.float32
) -> CompiledLinear:
    """A random layer, whose weight's numbers are of some dtype."""
    generator = torch.Generator().manual_seed(num_outputs)
    weight, bias = (
        torch.randn(num_outputs, num_inputs, generator=generator),
        torch.randn(num_outputs, generator=generator),
    )
    assert can_compile(torch.float32)
    return CompiledLinear(weight.to(stored).float(), bias if has_bias else None)


def half(num_outputs: int, num_inputs: int) -> CompiledLinear:
    """A random layer of a bfloat16 model."""
    wide = layer(num_outputs, num_inputs, stored=torch.bfloat16)
    return CompiledLinear(weight_of(wide).bfloat16(), wide.bias.bfloat16())


def weight_of(compiled: CompiledLinear) -> torch.Tensor:
    """Its numbers."""
    return torch.cat(list(compiled.dense()))


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(97, 130), (48, 256), (1, 1), (147, 1024), (64, 2049)])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 33, 400])
def test_it_equals_torchs(num_outputs: int, num_inputs: int, num_rows: int) -> None:
    """Outputs that fill panels and not, inputs that fill blocks and not, few rows and more than a part takes."""
    for has_bias in (True, False):
        compiled = layer(num_outputs, num_inputs, has_bias=has_bias)
        rows = torch.randn(num_rows, num_inputs)
        expected = nn.functional.linear(
            rows.double(), weight_of(compiled).double(), None if compiled.bias is None else compiled.bias.double()
        )
        torch.testing.assert_close(compiled(rows).double(), expected, atol=1e-5 * num_inputs**0.5, rtol=1e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(97, 130), (48, 256), (1, 2), (147, 1024), (64, 2050)])
def test_16_bits_are_the_same_product(
    num_outputs: int, num_inputs: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of 16-bit numbers takes half the memory, and every output has the bits of the weight in float32."""
    short = layer(num_outputs, num_inputs, stored=stored)
    monkeypatch.setattr(compiled_linear, "STORED", {torch.float32: "STORED_FLOAT32"})
    wide = layer(num_outputs, num_inputs, stored=stored)
    assert (short.stored, wide.stored) == (stored, torch.float32)
    assert 2 * short.packed.nbytes == wide.packed.nbytes
    assert torch.equal(weight_of(short), weight_of(wide))
    for num_rows in (0, 1, 2, 5, 6, 7, 8, 9, 33, 400):
        rows = torch.randn(num_rows, num_inputs)
        assert torch.equal(short(rows), wide(rows)), num_rows


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_an_odd_number_of_inputs_stays_what_it_is(stored: torch.dtype) -> None:
    """bfloat16 lie in pairs: where one is left over, another form takes the weight, whole."""
    odd = layer(97, 131, stored=stored)
    rows = torch.randn(5, 131)
    expected = nn.functional.linear(rows.double(), weight_of(odd).double(), odd.bias.double())
    torch.testing.assert_close(odd(rows).double(), expected, atol=1e-4, rtol=1e-5)
    assert weight_of(odd).shape == (97, 131) and torch.equal(weight_of(odd).to(stored).float(), weight_of(odd))


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (40, 129), (96, 128), (96, 129)])
def test_one_number_that_needs_more_bits_keeps_them_all(place: tuple[int, int]) -> None:
    """Wherever it stands the weight stays as it is; numbers that float16 alone holds stay in that."""
    for odd, stored in ((1 / 3, torch.float32), (1 + 2**-9, torch.float16), (float("inf"), torch.bfloat16)):
        weight = torch.randint(-8, 9, (97, 130)) / 8
        weight[place] = odd
        compiled = CompiledLinear(weight, None)
        assert compiled.stored is stored
        assert torch.equal(weight_of(compiled), weight)


def test_numbers_stay_what_they_are() -> None:
    """Zeros keep their sign, the smallest numbers are not lost, the largest are no infinities."""
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        info = torch.finfo(stored)
        edges = torch.tensor([0.0, -0.0, info.tiny, info.smallest_normal / 4, -info.max, info.eps, 1.0, -1.0])
        weight = edges.to(stored).float().repeat(60, 5)
        compiled = CompiledLinear(weight, None)
        assert compiled.stored is stored
        assert torch.equal(weight_of(compiled).view(torch.int32), weight.view(torch.int32))


def test_a_weight_may_lie_the_other_way_round() -> None:
    """GPT-2's are stored as `[in_features, out_features]`."""
    compiled = layer(97, 130)
    other = CompiledLinear(weight_of(compiled).t().contiguous().t(), compiled.bias)
    assert torch.equal(other.packed, compiled.packed)


def test_a_weight_is_in_memory_once() -> None:
    """Nobody keeps the one that was given; what is no multiple of a panel is filled up."""
    given = torch.randn(97, 130).bfloat16().float()
    gone = weakref.ref(given)
    compiled = CompiledLinear(given, None)
    del given
    assert gone() is None
    assert sum(one.nbytes for one in compiled.parameters()) <= 2 * 144 * 130


def test_whoever_wants_the_weights_numbers_is_told() -> None:
    """Models may ask for its shape, dtype and device, and compute with nothing that is not there."""
    weight = layer(97, 130).weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((97, 130), torch.float32, "cpu")
    assert torch.zeros(2, 130).to(weight.device, weight.dtype).is_cpu
    for use in (
        lambda: nn.functional.linear(torch.zeros(2, 130), weight),
        lambda: torch.zeros(2, 130) @ weight.t(),
        lambda: torch.add(weight, 1),
        lambda: weight.sum().item(),
    ):
        with pytest.raises(TypeError, match="a weight that is packed"):
            use()


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_models_that_reach_past_the_layers_are_refused(
    quantization: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start and not by a wrong answer; the control is the class as it is."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.linear(hidden, self.gate_proj.weight)
        down: torch.Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(hidden))
        return down

    load_model(tiny_models["llama"], quantization=quantization)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ModelRefusedError, match="a weight that is packed"):
        load_model(tiny_models["llama"], quantization=quantization)


@pytest.mark.parametrize("place", [(0, 0), (60, 7)])
def test_a_weight_that_is_not_a_number_is_refused_by_the_proof(
    place: tuple[int, int], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Wherever it stands: it is packed as it is, and its answers are seen."""
    model = LlamaForCausalLM.from_pretrained(tiny_models["llama"])
    model.model.layers[0].mlp.up_proj.weight.data[place] = math.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError, match="probe row"):
        load_model(tmp_path)


def test_rows_need_not_lie_together() -> None:
    """Columns of something wider, and several leading dimensions."""
    compiled = layer(97, 130)
    wide = torch.randn(2, 5, 200)
    expected = nn.functional.linear(wide[..., 10:140], weight_of(compiled), compiled.bias)
    torch.testing.assert_close(compiled(wide[..., 10:140]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2, 131), torch.zeros(2, 129), torch.zeros(2, 130).double(), torch.zeros(2, 130, device="meta")],
)
def test_other_rows_are_refused(rows: torch.Tensor) -> None:
    """Of another width or dtype: the kernel would read and write what is not theirs."""
    with pytest.raises(ValueError, match=r"a row is 130 torch\.float32 numbers"):
        layer(97, 130)(rows)


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


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(97, 130), (48, 256), (1, 2), (147, 1024), (64, 30)])
def test_the_gradient_of_few_rows_passes_the_packed_weight(
    num_outputs: int, num_inputs: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of rows and what is left of them, inputs that fill vectors and not; nothing is unpacked."""
    compiled = layer(num_outputs, num_inputs, stored=stored)
    weight = weight_of(compiled).double()
    assert compiled.stored is stored or num_outputs == 1
    monkeypatch.setattr(CompiledLinear, "dense", lambda self: pytest.fail("it was unpacked"))
    for num_rows in (0, 1, 3, 4, 5, 33, compiled_linear.FEW_ROWS):
        grads = torch.randn(num_rows, num_outputs)
        found = compiled.passed_back(grads)
        torch.testing.assert_close(found.double(), grads.double() @ weight, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_numbers", [1, 130 * 48, 130 * 100, 1 << 22])
def test_the_gradient_passes(stored: torch.dtype, block_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward gives what torch's layer gives, from a weight that is unpacked in one block or in many."""
    monkeypatch.setattr(frozen_linear, "BLOCK_NUMBERS", block_numbers)
    monkeypatch.setattr(compiled_linear, "FEW_ROWS", 0)
    compiled = layer(300, 130, stored=stored)
    assert compiled.stored is stored
    rows = torch.randn(5, 130, requires_grad=True)
    grads = torch.randn(5, 300)
    (found,) = torch.autograd.grad(compiled(rows), rows, grads)
    expected = grads.double() @ weight_of(compiled).double()
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=[True, False], ids=["instruction", "widened"])
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel for bfloat16 rows with the processor's instruction, where it has it, and without."""
    if request.param and not compiled_linear._has_pairs():
        pytest.skip("this processor has no instruction for pairs of bfloat16")
    monkeypatch.setattr(compiled_linear, "_has_pairs", lambda: request.param)
    compiled_linear.linear_kernel.cache_clear()
    yield
    compiled_linear.linear_kernel.cache_clear()


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(97, 130), (48, 256), (1, 2), (147, 1024), (64, 2050)])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 33, 400])
def test_bfloat16_rows_are_rounded_once(num_outputs: int, num_inputs: int, num_rows: int) -> None:
    """The exact product to within one rounding at the end, whose unit is 2^-8, and float32's on the way."""
    compiled = half(num_outputs, num_inputs)
    rows = torch.randn(num_rows, num_inputs).bfloat16()
    expected = nn.functional.linear(rows.double(), weight_of(compiled).double(), compiled.bias.double())
    found = compiled(rows)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * num_inputs**0.5, rtol=2**-8)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("num_inputs", [130, 1024])
def test_bits_of_bfloat16_rows_depend_on_nobody_else(num_inputs: int) -> None:
    """Alone and among any number of others; a fault in one row reaches all of its outputs and no other row."""
    compiled = half(97, num_inputs)
    rows = torch.randn(400, num_inputs).bfloat16()
    together = compiled(rows)
    for count in (1, 2, 5, 8, 13, 64, 193):
        assert torch.equal(compiled(rows[:count]), together[:count])
        assert torch.equal(compiled(rows[-count:]), together[-count:])
    for bad in (math.nan, math.inf):
        rows[7, 60] = bad
        found = compiled(rows)
        assert not found[7].isfinite().any()
        assert torch.equal(found[:7], together[:7]) and torch.equal(found[8:], together[8:])


@pytest.mark.parametrize("special", [math.inf, -math.inf, 0.0, -0.0, 3.3895e38, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
def test_rounding_is_torchs(special: float) -> None:
    """What overflows is an infinity, halves go to even, zeros keep their sign."""
    compiled = CompiledLinear(torch.zeros(50, 2).bfloat16(), None)
    compiled._product = compiled._kernel.product(compiled.packed, torch.full((50,), special), compiled.weight.shape)
    expected = torch.full((1, 50), special).bfloat16()
    found = compiled(torch.zeros(1, 2).bfloat16())
    if special == 0:  # the sum of a negative zero and a zero is a zero
        expected = expected.abs()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.usefixtures("pairs")
def test_the_gradient_of_bfloat16_rows_passes() -> None:
    """Backward gives what torch's layer gives."""
    compiled = half(300, 130)
    rows = torch.randn(5, 130).bfloat16().requires_grad_()
    grads = torch.randn(5, 300).bfloat16()
    (found,) = torch.autograd.grad(compiled(rows), rows, grads)
    expected = grads.double() @ weight_of(compiled).double()
    torch.testing.assert_close(found.double(), expected, atol=2**-7, rtol=2**-7)


def test_bfloat16_rows_take_what_is_theirs() -> None:
    """Rows of another dtype are refused, and of an odd number of inputs nothing is compiled."""
    with pytest.raises(
        ValueError, match=r"a row is 130 torch\.bfloat16 numbers on the CPU, not 130 torch\.float32 on cpu"
    ):
        half(97, 130)(torch.zeros(2, 130))
    assert can_compile(torch.bfloat16, 130) and not can_compile(torch.bfloat16, 131)
    assert can_compile(torch.float32, 131) and not can_compile(torch.float16)


def test_rooms_are_of_huge_pages() -> None:
    """They begin where a page does, hold what is written to them, and are of zeros, not of what was there before."""
    room = compiled_linear._empty_in_huge_pages(3_000_001, torch.int16)
    assert room.data_ptr() % (2 << 20) == 0 and room.dtype is torch.int16 and room.shape == (3_000_001,)
    assert not room.any()
    assert len(compiled_linear._empty_in_huge_pages(5, torch.float32)) == 5
