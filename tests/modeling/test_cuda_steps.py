"""Steps as CUDA graphs: which, and with what inputs, in Triton's interpreter and with graphs that are none."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from promptd.modeling import FrozenModel, KVPool, PackedBatch, PackedRow, Virtual, load_model

if TYPE_CHECKING:
    from promptd.modeling.cuda_steps import CudaSteps, Run

ROOT = Path(__file__).parents[2]
NUM_SLOTS = 256


class FakeRecorder:
    """What a CUDA graph does: computes the same again from the same places into the same place, and then `spoil`."""

    def __init__(self, spoil: Callable[[], None] = lambda: None) -> None:
        self.num_recorded = 0
        self.num_replayed = 0
        self._spoil = spoil

    def __call__(self, run: Run) -> Run:
        """Record."""
        self.num_recorded += 1
        run()

        def replay() -> None:
            self.num_replayed += 1
            run()
            self._spoil()

        return replay


def make_pools(model: FrozenModel) -> tuple[KVPool, KVPool]:
    """Two with the same keys and values of 0 to 200, and nothing where nobody wrote."""
    generator = torch.Generator().manual_seed(3)
    pools = model.make_pool(NUM_SLOTS), model.make_pool(NUM_SLOTS)
    for name in ("keys", "values"):
        stored = torch.randn(getattr(pools[0], name)[:, :, :200].shape, generator=generator)
        for pool in pools:
            getattr(pool, name).fill_(float("nan"))
            getattr(pool, name)[:, :, :200] = stored
    return pools


def make_rows(dice: random.Random, num_rows: int, model: FrozenModel) -> list[PackedRow]:
    """Single tokens behind one to four spans of any place and length, some of them embeddings."""
    rows = []
    slots = dice.sample(range(200, NUM_SLOTS), num_rows)
    for slot in slots:
        starts = [dice.randrange(150) for _ in range(dice.randint(1, 4))]
        context = [(start, dice.randint(1, 25)) for start in starts]
        virtual = (Virtual(0, torch.randn(1, model.spec.hidden_size)),) if dice.random() < 0.2 else ()
        position = sum(count for _, count in context)
        rows.append(PackedRow([dice.randrange(300)], position, [slot], context, (0,), virtual))
    return rows


def make_steps(model: FrozenModel, pool: KVPool, recorder: FakeRecorder) -> CudaSteps:
    """Graphs of this recorder."""
    from promptd.modeling.cuda_steps import CudaSteps

    return CudaSteps(model, pool, recorder)


def check_steps(folder: str) -> None:
    """Steps of all sizes give what the model gives by itself, and write the same keys and values; a graph serves as
    many rows as it has or fewer."""
    from promptd.modeling import attention_triton

    attention_triton.SPLIT_KEYS = 32  # several ranges
    model = load_model(folder)
    dice, recorder, (ours, theirs) = random.Random(5), FakeRecorder(), make_pools(model)
    steps = make_steps(model, ours, recorder)
    for num_rows in (3, 4, 1, 3, 2, 5, 3):
        rows = make_rows(dice, num_rows, model)
        found, expected = steps(PackedBatch(rows, ours)), model.forward_packed(PackedBatch(rows, theirs))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(mine, other, atol=2e-4, rtol=2e-4, equal_nan=True)
    assert recorder.num_recorded == len(steps._graphs) < 7
    assert {size for size, _ in steps._graphs} == {1, 2, 4, 8}
    assert recorder.num_replayed == 7, "all steps but the first of a size, and that one's trial"


def check_others(folder: str) -> None:
    """What is no step of single tokens, has too many spans, or more rows than there are graphs for, is the model's."""
    from promptd.modeling import cuda_steps

    model = load_model(folder)
    recorder, (ours, _) = FakeRecorder(), make_pools(model)
    steps = make_steps(model, ours, recorder)
    prefill = PackedRow([1, 2, 3], 0, [200, 201, 202], [], (2,))
    silent = PackedRow([1], 0, [200], [])
    for rows in ([prefill], [silent], [prefill, *make_rows(random.Random(1), 2, model)]):
        assert len(steps(PackedBatch(rows, ours))) == sum(len(row.logits) for row in rows)
    torn = PackedRow([1], 200, [201], [(number, 1) for number in range(200)], (0,))
    assert len(steps(PackedBatch([torn], ours))) == 1
    cuda_steps.SIZES = (1, 2)
    assert len(steps(PackedBatch(make_rows(random.Random(2), 3, model), ours))) == 3
    assert recorder.num_recorded == 0


def check_failures(folder: str) -> None:
    """A graph that gives something else is never used, nor is one that cannot be recorded; rows of no number tell
    nothing about it."""
    model = load_model(folder)
    rows, (ours, theirs) = make_rows(random.Random(4), 2, model), make_pools(model)
    expected = model.forward_packed(PackedBatch(rows, theirs))

    written = [slot for row in rows for slot in row.slots]

    def spoil() -> None:
        assert steps._logits is not None
        steps._logits += 0.5
        for stored in (ours.keys, ours.values):
            stored[:, :, written] += 0.5

    class Failing(FakeRecorder):
        def __call__(self, run: Run) -> Run:
            super().__call__(run)
            spoil()
            raise RuntimeError("operation not permitted when stream is capturing")

    for recorder in (FakeRecorder(spoil), Failing()):
        steps = make_steps(model, ours, recorder)
        for _ in range(3):
            torch.testing.assert_close(steps(PackedBatch(rows, ours)), expected, atol=1e-5, rtol=1e-5)
            for stored, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(stored, other, atol=1e-5, rtol=1e-5, equal_nan=True)
        assert recorder.num_recorded == 1
    recorder = FakeRecorder()
    steps = make_steps(model, ours, recorder)
    poison = Virtual(0, torch.full((1, model.spec.hidden_size), float("nan")))
    hostile = PackedRow([0], 1, [210], [(0, 1)], (0,), (poison,))
    assert steps(PackedBatch([hostile, hostile], ours)).isnan().all()
    assert recorder.num_recorded == 0
    torch.testing.assert_close(steps(PackedBatch(rows, ours)), expected, atol=1e-5, rtol=1e-5)
    assert recorder.num_recorded == 1 and len(steps._graphs) == 1


@pytest.mark.parametrize("check", [check_steps, check_others, check_failures])
def test_in_the_interpreter(tiny_models: dict[str, Path], check: Callable[[str], None]) -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    code = f"from tests.modeling.test_cuda_steps import {check.__name__} as check\ncheck({str(tiny_models['llama'])!r})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
