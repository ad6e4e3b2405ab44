"""The CUDA attention kernel: in Triton's interpreter here, on a device with `-m gpu`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from promptd.modeling.attention import Site
from promptd.modeling.attention_pooled import PooledAttention
from promptd.modeling.frozen import attention_for
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow

ROOT = Path(__file__).parents[2]


def compare(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, split_keys: int) -> None:
    """Both attentions over the same ragged batch: decode rows, prefill chunks, several spans, shared spans, and a row
    that reads what another row of the batch writes; raises `AssertionError` where they differ."""
    from promptd.modeling import attention_triton

    attention_triton.SPLIT_KEYS = split_keys
    generator = torch.Generator().manual_seed(num_heads * 100 + head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = [
        PackedRow([1], 40, [60], [(0, 17), (30, 30)]),  # decode, its slot continues the last span
        PackedRow([1], 17, [100], [(0, 17)]),  # decode, its slot lies apart
        PackedRow([1] * 5, 0, range(200, 205), []),  # a prompt on its way into the pool
        PackedRow([1] * 9, 5, [*range(110, 114), *range(120, 125)], [(200, 5)]),  # reads it at once; two runs
        PackedRow([1] * 70, 17, range(300, 370), [(0, 17)]),  # longer than a block of queries
        PackedRow([1], 0, [400], []),
    ]
    pools = []
    for _ in range(2):
        pool = KVPool(
            num_layers=1, num_slots=512, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        pool.keys.fill_(float("nan"))  # a slot that nobody wrote must never be read
        pool.values.fill_(float("nan"))
        pools.append(pool)
    held = torch.tensor([*range(17), *range(30, 60)])
    old_keys, old_values = random(1, num_kv_heads, 47, head_dim), random(1, num_kv_heads, 47, head_dim)
    count = sum(len(row.slots) for row in rows)
    query, key, value = (random(1, heads, count, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads))
    found = []
    for pool, attention in zip(pools, (attention_triton.TritonAttention.of, PooledAttention), strict=True):
        pool.write(0, held, old_keys, old_values)
        found.append(attention(PackedBatch(rows, pool)).attend(Site(0, 0.3, window), query, key, value))
    assert torch.isfinite(found[1]).all()
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=2e-5)


CASES = {
    "plain": (4, 4, 16, None, 1024),
    "grouped heads, padded size, splits": (4, 2, 24, None, 32),
    "window and splits": (8, 2, 64, 11, 16),
}


def test_the_kernel_equals_the_cpu_path() -> None:
    """Over ragged spans, grouped heads, odd head sizes, windows and fixed splits, in Triton's interpreter."""
    pytest.importorskip("triton")
    code = "from tests.modeling.test_attention_triton import CASES, compare\nfor case in CASES.values(): compare(*case)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported: a process of its own
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_rows_are_exact_on_a_device(tiny_models: dict[str, Path], family: str) -> None:
    """On CUDA in fp32 a mixed batch gives transformers' own tokens."""
    from promptd.engine.config import EngineConfig
    from promptd.engine.engine import Engine
    from promptd.modeling import load_model
    from promptd.modeling.cuda_steps import CudaSteps
    from tests.engine.harness import Case, assert_matches_oracle, greedy, library, run

    folder = tiny_models[family]
    model = load_model(folder, device="cuda", dtype="float32")
    engine = Engine(model, EngineConfig(kv_cache_bytes=1 << 24, prompt_cache_bytes=1 << 24))
    rng = random.Random(2)
    cases = [
        Case((prompt,), tuple(rng.randrange(1, 320) for _ in range(rng.randint(1, 40))), greedy(10), n % 4)
        for n, prompt in enumerate(library(folder))
    ]
    run(engine, cases)
    assert type(attention_for(PackedBatch([PackedRow([1], 0, [0], [])], engine.pool))).__name__ == "TritonAttention"
    steps = engine._runner._steps
    assert isinstance(steps, CudaSteps) and steps._graphs, "its steps were CUDA graphs"
    for case in cases:
        assert_matches_oracle(folder, case)
