"""How much of a job a killed worker takes along: no more than the time between two checkpoints, as the job counts."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

import pytest

from promptd.modeling import FrozenModel
from promptd.training import Example, TaskFormat, train
from promptd.training import job as job_module
from promptd.training.job import CHECKPOINT_SECONDS, TrainingJob
from promptd.training.job_run import JobRun
from tests.training.test_job import CONFIG

SAVING_SECONDS = 1


def test_a_checkpoint_is_safe_in_time(
    llama: FrozenModel, text_rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once a step: it is begun so early that it is safe a second later; the first one comes soon.

    The control is the same job under a run that was told to take twice the time.
    """
    learn, clock = TrainingJob._learn, 0.0

    def ticking(self: TrainingJob, *args: Any) -> Any:
        nonlocal clock
        clock += 1
        return learn(self, *args)

    class Clock:
        monotonic = staticmethod(lambda: clock)

    monkeypatch.setattr(TrainingJob, "_learn", ticking)
    monkeypatch.setattr(job_module, "time", Clock)

    async def saved_at(seconds: float) -> list[float]:
        nonlocal clock
        clock = 0.0
        run = JobRun(None, None, None, None, checkpoint_seconds=seconds)  # type: ignore[arg-type]
        found = [0.0]

        def put(message: object) -> None:
            if isinstance(message, bytes):
                found.append(clock)
                run._watcher.on_checkpoint = run._put_checkpoint  # the store had it at once

        monkeypatch.setattr(run, "_put", put)
        config = dataclasses.replace(CONFIG, num_steps=40)
        job = TrainingJob(llama, config, TaskFormat(), text_rows, text_rows)
        await asyncio.to_thread(train, llama, {"job": job}, {"job": run._watcher})
        return [*found, clock]

    def lost(times: list[float]) -> float:
        return max(after - before for before, after in itertools.pairwise(times)) + SAVING_SECONDS

    times = asyncio.run(saved_at(CHECKPOINT_SECONDS))
    assert times[1] == 2 and lost(times) <= CHECKPOINT_SECONDS
    assert lost(asyncio.run(saved_at(2 * CHECKPOINT_SECONDS))) > CHECKPOINT_SECONDS
