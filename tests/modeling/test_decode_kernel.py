"""The compiled decode attention against plain products in float64; its bits; and how it is had or not had."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from promptd.modeling import decode_kernel as kernels
from promptd.modeling.decode_kernel import DecodeKernel, RowPlan, decode_kernel
from promptd.modeling.kv_pool import Span

Run = list[tuple[int, list[Span]]]
NUM_SLOTS = 700


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine: ./tests/run could not install it")


def kernel_for(dtype: torch.dtype = torch.float32) -> DecodeKernel:
    """The kernel, which must be there where a compiler is."""
    kernel = decode_kernel(dtype)
    assert kernel is not None
    return kernel


def make(
    num_heads: int, num_kv_heads: int, dim: int, num_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries as a model's fused product leaves them (strided), keys and values."""
    generator = torch.Generator().manual_seed(dim)
    fused = torch.randn(1, num_tokens, num_heads + 3, dim, generator=generator)
    keys, values = (torch.randn(1, num_kv_heads, NUM_SLOTS, dim, generator=generator).to(dtype) for _ in range(2))
    return fused.to(dtype)[:, :, :num_heads].transpose(1, 2), keys, values


def attend(
    runs: list[Run], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float = 0.2
) -> torch.Tensor:
    """The kernel's answer, `[num_tokens, num_heads, dim]`; NaN where no row of a run is."""
    out = torch.full((1, query.shape[2], query.shape[1], query.shape[3]), math.nan, dtype=query.dtype)
    kernel_for(query.dtype).attend(out, query, keys, values, scale, RowPlan(runs))
    return out[0]


def expected(
    spans: list[Span], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float = 0.2
) -> torch.Tensor:
    """One token's answer in float64: query `[num_heads, dim]`."""
    slots = torch.cat([torch.arange(start, start + length) for start, length in spans])
    group = query.shape[0] // keys.shape[1]
    key, value = (stored[0, :, slots].repeat_interleave(group, 0).double() for stored in (keys, values))
    weights = ((query.double().unsqueeze(1) @ key.transpose(1, 2)) * scale).softmax(-1)
    return (weights @ value).squeeze(1)


RUNS: list[Run] = [
    [(4, [(10, 150), (300, 1)]), (0, [(10, 150)]), (2, [(10, 150), (301, 63), (420, 200)])],
    [(1, [(0, 1)])],
    [(5, [(500, 64), (600, 64)]), (6, [(500, 64)])],
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim"), [(4, 4, 64), (6, 2, 20), (8, 1, 128), (2, 2, 256), (3, 3, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_plain_products(num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Ragged spans, shared ones, heads in groups, odd sizes, both dtypes."""
    query, keys, values = make(num_heads, num_kv_heads, dim, 8, dtype)
    found = attend(RUNS, query, keys, values)
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3  # half a unit of bfloat16's last place, at 1
    for token, spans in (row for run in RUNS for row in run):
        want = expected(spans, query[0, :, token], keys, values)
        torch.testing.assert_close(found[token].double(), want, atol=tolerance, rtol=tolerance)
    assert found[[3, 7]].isnan().all()  # tokens of others are not touched


def test_large_scores_and_lone_keys() -> None:
    """Scores far apart: the sums so far shrink to the new scale, and nothing overflows."""
    query, keys, values = make(2, 2, 64, 1)
    keys[:, :, :300] *= torch.linspace(0, 40, 300)[:, None]
    found = attend([[(0, [(0, 300)])]], query, keys, values, scale=1.0)
    torch.testing.assert_close(
        found[0].double(), expected([(0, 300)], query[0, :, 0], keys, values, 1.0), atol=1e-4, rtol=1e-4
    )


def test_bits_depend_on_nobody_else() -> None:
    """A row gets the same bits alone, in a run with others, and with its keys cut into other spans."""
    query, keys, values = make(4, 2, 64, 8)
    together = attend(RUNS, query, keys, values)
    for token, spans in (row for run in RUNS for row in run):
        alone = attend([[(token, spans)]], query, keys, values)
        assert torch.equal(alone[token], together[token])
        cut = [
            part
            for start, length in spans
            for part in ((start, length // 3), (start + length // 3, length - length // 3))
            if part[1]
        ]
        assert torch.equal(attend([[(token, cut)]], query, keys, values)[token], together[token])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_not_a_number_stays_so_and_alone(bad: float, where: str) -> None:
    """A fault in one row's keys or values shows in that row, in all heads that read it, and in no other."""
    query, keys, values = make(4, 2, 64, 8)
    clean = attend(RUNS, query, keys, values)
    (keys if where == "keys" else values)[0, 1, 430] = bad  # of row 2 alone
    found = attend(RUNS, query, keys, values)
    assert not found[2, 2:].isfinite().any()
    assert torch.equal(found[2, :2], clean[2, :2])
    others = [4, 0, 1, 5, 6]
    assert torch.equal(found[others], clean[others])


def compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> DecodeKernel | None:
    """Ask as a new process would, with this folder."""
    monkeypatch.setenv(kernels.FOLDER_VARIABLE, str(folder))
    decode_kernel.cache_clear()
    try:
        return decode_kernel(torch.float32)
    finally:
        decode_kernel.cache_clear()


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process finds the first one's; a compiler that fails then is not asked."""
    assert compiled(tmp_path / "kernels", monkeypatch) is not None
    (made,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setenv("CC", "false")
    assert compiled(tmp_path / "kernels", monkeypatch) is not None
    made.unlink()
    assert compiled(tmp_path / "kernels", monkeypatch) is None


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_torch_serves(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, or one that fails: None, and no file is left behind."""
    monkeypatch.setenv("CC", compiler)
    assert compiled(tmp_path / "kernels", monkeypatch) is None
    assert not list(tmp_path.rglob("*.so"))
    assert compiled(Path("off"), monkeypatch) is None


def test_a_library_that_others_can_change_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What anybody may write is not run; the control is the same file with its rights put right."""
    assert compiled(tmp_path, monkeypatch) is not None
    (made,) = tmp_path.iterdir()
    made.chmod(0o777)
    assert compiled(tmp_path, monkeypatch) is None
    made.chmod(0o700)
    assert compiled(tmp_path, monkeypatch) is not None


def test_a_kernel_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A miscompiled kernel fails its trial."""
    wrong = tmp_path / "wrong.c"
    wrong.write_text(kernels._SOURCE.read_text().replace("share = 1.0f / own->total", "share = 1.01f / own->total"))
    monkeypatch.setattr(kernels, "_SOURCE", wrong)
    assert compiled(tmp_path / "kernels", monkeypatch) is None
    assert list((tmp_path / "kernels").iterdir())  # it was compiled, and tried


def test_an_image_compiles_for_every_processor(tmp_path: Path) -> None:
    """`python -m promptd.modeling.decode_kernel FOLDER` makes what any machine will look for."""
    done = subprocess.run(
        [sys.executable, "-m", "promptd.modeling.decode_kernel", str(tmp_path)],
        env={**os.environ, "CC": "cc"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 4
    capability = torch.backends.cpu.get_cpu_capability()
    assert kernels._library(tmp_path, torch.float32, capability).name in names
