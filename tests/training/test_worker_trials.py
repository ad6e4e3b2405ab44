"""What a worker's process has trained is tried before it is published, as what a client uploads to a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from promptd.commands.worker import run_worker
from promptd.engine.runner import Answers, Made, Runner
from promptd.engine.schedule import Schedule
from promptd.errors import InvalidRequestError
from promptd.jobs import JobState
from promptd.modeling import FrozenModel
from promptd.settings import Settings
from tests.training.site import STEPS, Site, has_ended

PASSED = {"prompt": "is there", "max_tokens": 2, "excludes": ["@@never@@"]}
FAILED = {"prompt": "is there", "max_tokens": 2, "contains": ["@@never@@"]}


@asynccontextmanager
async def working(site: Site, **settings: Any) -> AsyncIterator[None]:
    """A worker in this process."""
    store = str(site.folder / "store")
    made = Settings(model=str(site.model_folder), store=store, checkpoint_seconds=0.0, **settings)
    worker = asyncio.create_task(run_worker(made))
    try:
        yield
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)


def test_probes(tmp_path: Path, tiny_models: dict[str, Path], llama: FrozenModel) -> None:
    """A suite that a prompt fails ends its job, and nothing is published; one that it passes (the control) lets it."""
    suite = tmp_path / "probes.jsonl"

    async def story() -> None:
        site = Site(tmp_path, tiny_models["llama"], llama)
        try:
            suite.write_text("\n".join(map(json.dumps, (PASSED, FAILED))))
            async with working(site, probe_suite=str(suite)):
                job = await site.until(await site.create("tried"), has_ended)
            assert job.state is JobState.FAILED and job.error is not None
            assert job.error.code == "probe_failed" and "1 of this server's 2 probes" in job.error.message
            assert "never" not in job.error.message
            suite.write_text(json.dumps(PASSED))
            async with working(site, probe_suite=str(suite)):
                await site.version(await site.create("tried"))
        finally:
            await site.store.close()

    asyncio.run(story())


def test_numbers_that_are_not_finite(
    tmp_path: Path, tiny_models: dict[str, Path], llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a suite: a prompt under which the model's numbers are not finite is not published."""
    run = Runner.run

    def broken(runner: Runner, step: Schedule, made: Made | None = None) -> Answers:
        answers = run(runner, step, made)
        answers.logits[:] = torch.nan
        return answers

    monkeypatch.setattr(Runner, "run", broken)

    async def story() -> None:
        site = Site(tmp_path, tiny_models["llama"], llama)
        try:
            async with working(site):
                job = await site.until(await site.create("broken", num_steps=STEPS["num_steps"] // 8), has_ended)
            assert job.state is JobState.FAILED and job.error is not None
            assert job.error.code == "non_finite_output"
        finally:
            await site.store.close()

    asyncio.run(story())


def test_a_bad_suite_ends_the_start(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Before a job is claimed, with the line's number."""
    suite = tmp_path / "probes.jsonl"
    suite.write_text("{")
    settings = Settings(model=str(tiny_models["llama"]), store=str(tmp_path / "store"), probe_suite=str(suite))
    with pytest.raises(InvalidRequestError, match="line 1"):
        asyncio.run(run_worker(settings))
