"""How kernels are had: compiled once, by the machine's compiler; and what serves where they cannot be."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from promptd.modeling import activations, compiled_linear, integer_product, kernels, load_model, norms, quantized_linear
from promptd.modeling.activations import GELU
from promptd.modeling.compiled_linear import (
    LINEAR,
    LINEAR_GRADIENT,
    CompiledLinear,
    can_compile,
    gradient_kernel,
    linear_kernel,
)
from promptd.modeling.decode_kernel import DECODE_ATTENTION, decode_kernel
from promptd.modeling.integer_product import LINEAR_INT8
from promptd.modeling.kernels import CAPABILITIES, FOLDER_VARIABLE, compiled
from promptd.modeling.norms import RMS_NORM
from promptd.modeling.packed_linear import PackedLinear, can_pack
from promptd.modeling.prefill_kernel import PREFILL_ATTENTION, prefill_kernel
from promptd.modeling.quantized_linear import QUANTIZE

PANELS, NUMBERS_H = "panels.h", "numbers.h"
BFLOAT16 = (torch.bfloat16,)
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no AVX-512 VNNI")
needs_pairs = pytest.mark.skipif(
    not compiled_linear._has_pairs(), reason="this processor has no instruction for pairs of bfloat16"
)


def loads() -> bool:
    """Whether a process that began now would have a kernel."""
    linear_kernel.cache_clear()
    return can_compile(torch.float32)


def test_they_are_compiled_once(fresh_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process finds the first one's; a compiler that fails then is not asked."""
    assert loads()
    (made,) = fresh_kernels.iterdir()
    monkeypatch.setenv("CC", "false")
    assert loads()
    made.unlink()
    assert not loads()


@pytest.mark.parametrize("compiler_name", ["false", "no-such-compiler"])
def test_without_a_compiler_there_are_none(
    compiler_name: str, fresh_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler, or one that fails: None, and no file is left behind; nor where they are switched off."""
    monkeypatch.setenv("CC", compiler_name)
    assert not loads()
    assert not list(fresh_kernels.rglob("*.so"))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv(FOLDER_VARIABLE, "off")
    assert not loads()


def test_a_home_that_is_not_known_is_no_error(fresh_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have no home folder: then there is no place for kernels, and torch's serve."""
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert not loads()


def test_a_library_that_others_can_change_is_not_loaded(fresh_kernels: Path) -> None:
    """What anybody may write is not run; the control is the same file with its rights put right."""
    assert loads()
    (made,) = fresh_kernels.iterdir()
    made.chmod(0o777)
    assert not loads()
    made.chmod(0o700)
    assert loads()


def test_a_model_is_served_with_them_and_without(
    tiny_models: dict[str, Path], fresh_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler the layers are compiled; without one they are packed for torch's kernels: both are proven."""
    layer = load_model(tiny_models["llama"]).hf.model.layers[0].mlp.up_proj
    assert isinstance(layer, CompiledLinear) and decode_kernel(torch.float32) is not None
    for cache in (linear_kernel, decode_kernel):
        cache.cache_clear()
    monkeypatch.setenv(FOLDER_VARIABLE, "off")
    layer = load_model(tiny_models["llama"]).hf.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear if can_pack(torch.float32) else torch.nn.Linear)
    assert decode_kernel(torch.float32) is None


@pytest.mark.parametrize(
    ("source", "old", "new", "load", "arguments"),
    [
        (LINEAR, "+= wide[i] * value;", "+= wide[i] * (value + 0.01f);", linear_kernel, (torch.float32,)),
        (PANELS, "0xffff0000 : from << 16); }\nstatic", "0xffff0000 : from << 17); }\nstatic", linear_kernel, BFLOAT16),
        (PANELS, "bits_of(first) >> 16", "bits_of(first) >> 17", linear_kernel, BFLOAT16),
        (NUMBERS_H, "0x7fff + (bits >> 16 & 1)) >> 16;\n}", "0x17fff) >> 16;\n}", linear_kernel, 2 * BFLOAT16),
        (NUMBERS_H, "from) { return of_bits", "from) { return -of_bits", norms._kernel, BFLOAT16),
        (LINEAR_GRADIENT, "sum += widened", "sum += 1.01f * widened", gradient_kernel, (torch.float32,)),
        (LINEAR_GRADIENT, "(weights[i], part)", "(weights[i], 0)", gradient_kernel, BFLOAT16),
        (
            LINEAR_GRADIENT,
            "left = count - input < LANES ? count - input : LANES",
            "left = LANES / 2",
            gradient_kernel,
            (torch.float16,),
        ),
        pytest.param(LINEAR, "vdpbf16ps %2", "vaddps %2", linear_kernel, 2 * BFLOAT16, marks=needs_pairs),
        (NUMBERS_H, "& ~is_nan) |", "& is_nan) |", activations._kernel, BFLOAT16),
        (NUMBERS_H, "halves upper;\n    memcpy", "halves upper = {0};\n    if (0) memcpy", norms._kernel, BFLOAT16),
        (PANELS, "(word)first", "(word)(first * 2)", linear_kernel, (torch.float16,)),
        (DECODE_ATTENTION, "share = 1.0f / own->total", "share = 1.01f / own->total", decode_kernel, (torch.float32,)),
        (DECODE_ATTENTION, "+ 1 - row->num_keys", "- row->num_keys", decode_kernel, (torch.float32,)),
        (GELU, "exponential(-2.0f * u)", "exponential(-2.001f * u)", activations._kernel, (torch.float32,)),
        (RMS_NORM, "total / dim + epsilon", "1.01f * total / dim + epsilon", norms._kernel, (torch.float32,)),
        (PREFILL_ATTENTION, "share = 1.0f / one->total", "share = 1.01f / one->total", prefill_kernel, ()),
        (PREFILL_ATTENTION, "first + row + 1 - at", "first + row + 2 - at", prefill_kernel, ()),
        (QUANTIZE, "(float)largest + 1.5f", "(float)largest + 3.5f", quantized_linear._kernel, ()),
        pytest.param(
            LINEAR_INT8, "sums[row][i] - offsets", "sums[row][i]", integer_product._kernel, (), marks=needs_vnni
        ),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(
    source: str,
    old: str,
    new: str,
    load: Any,
    arguments: tuple[torch.dtype, ...],
    compiler: None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A miscompiled kernel fails its trial, and the log says so; the control is the kernel as it is."""
    assert load(*arguments) is not None
    folder: Path = request.getfixturevalue("fresh_kernels")
    shutil.copytree(kernels.SOURCES, tmp_path / "sources")
    text = (tmp_path / "sources" / source).read_text()
    assert text.count(old) == 1
    (tmp_path / "sources" / source).write_text(text.replace(old, new))
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "sources")
    assert load(*arguments) is None
    tried = {linear_kernel: LINEAR, activations._kernel: GELU, norms._kernel: RMS_NORM}.get(load, source)
    assert [record.args for record in caplog.records if record.levelname == "WARNING"] == [(tried,)]
    assert len(list(folder.glob(f"{Path(tried).stem}-*"))) == 1  # it was compiled, and tried


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_other_processors_kernels_are_right(
    capability: str, fresh_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older processor would compile and load passes its trial, too."""
    if capability == "AVX2" and torch.backends.cpu.get_cpu_capability() not in CAPABILITIES:
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert can_compile(torch.float32)
    assert linear_kernel(torch.bfloat16) is not None
    widens = capability != "DEFAULT" or platform.machine() == "aarch64"
    assert (linear_kernel(torch.float16) is not None) == widens
    assert linear_kernel(torch.bfloat16, torch.bfloat16) is not None
    assert gradient_kernel(torch.float32) is not None and gradient_kernel(torch.bfloat16) is not None
    for dtype in (torch.float32, torch.bfloat16):
        assert decode_kernel(dtype) is not None
        assert activations._kernel(dtype) is not None
        assert norms._kernel(dtype) is not None
    assert quantized_linear._kernel() is not None
    assert integer_product._kernel() is None  # there is no instruction for it
    assert prefill_kernel() is not None
    assert len(list(fresh_kernels.iterdir())) == 14 + widens


@pytest.mark.long
def test_an_image_compiles_for_every_processor(fresh_kernels: Path) -> None:
    """`python -m promptd.modeling.kernels FOLDER` makes what any machine will look for."""
    done = subprocess.run(
        [sys.executable, "-m", "promptd.modeling.kernels", str(fresh_kernels)],
        env={**os.environ, "CC": "cc"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {path.name for path in fresh_kernels.iterdir()}
    assert len(names) == 33  # sixteen kernels for two kinds, and one that is for the newest
    for capability in CAPABILITIES:
        for define in compiled_linear.STORED.values():
            assert compiled(LINEAR, (define,), fresh_kernels, capability).name in names
        assert compiled(DECODE_ATTENTION, (), fresh_kernels, capability).name in names
