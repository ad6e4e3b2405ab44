"""Kernels compiled into a test's own folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptd.modeling import activations, compiled_linear, decode_kernel, kernels, quantized_linear

_CACHES = (
    decode_kernel.decode_kernel,
    compiled_linear._kernel,
    compiled_linear.can_compile,
    activations._kernel,
    quantized_linear._kernel,
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


@pytest.fixture
def changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Change a line of a kernel's source for this test."""

    def change(source: str, old: str, new: str) -> None:
        shutil.copytree(kernels.SOURCES, tmp_path / "sources")
        text = (tmp_path / "sources" / source).read_text()
        assert text.count(old) == 1
        (tmp_path / "sources" / source).write_text(text.replace(old, new))
        monkeypatch.setattr(kernels, "SOURCES", tmp_path / "sources")

    return change
