"""Kernels compiled into a test's own folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptd.modeling import (
    activations,
    compiled_linear,
    decode_kernel,
    integer_product,
    kernels,
    norms,
    prefill_kernel,
    quantized_linear,
)

_CACHES = (
    decode_kernel.decode_kernel,
    compiled_linear.linear_kernel,
    compiled_linear.gradient_kernel,
    activations._kernel,
    norms._kernel,
    integer_product._kernel,
    quantized_linear._kernel,
    prefill_kernel.prefill_kernel,
)


@pytest.fixture
def compiler() -> None:
    """A C compiler, which the kernels need."""
    if os.environ.get(kernels.FOLDER_VARIABLE) == "off":
        pytest.skip(f"{kernels.FOLDER_VARIABLE} says off")
    if shutil.which("cc") is None:
        pytest.skip(
            "no C compiler on this machine, and ./tests/run could not install it: apt-get install gcc libc6-dev"
        )


@pytest.fixture
def fresh_kernels(compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for kernels; nothing is loaded yet, as in a new process."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv(kernels.FOLDER_VARIABLE, str(folder))
    for cache in _CACHES:
        cache.cache_clear()
    yield folder
    for cache in _CACHES:
        cache.cache_clear()
