"""A store with training jobs, looked at from outside while processes come and go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from promptd_store import EmbeddedStore, PromptCatalog

from promptd.jobs import JobData, JobQueue, JobRecord, JobRequest, JobSpec
from promptd.modeling import FrozenModel
from promptd.training import make_artifact, train
from promptd.training.job_spec import check_spec
from promptd.training.plan import make_job
from tests.training.process import process

TENANT = "default"
"""Whose requests a server without keys takes."""
ROWS = [
    {"text": f"{verb} {thing} {n}" + " again" * (n % 5), "label": label}
    for n in range(12)
    for verb, thing, label in (("is there", "rain", "weather"), ("play a", "song", "music"))
]
CONTENT = "\n".join(map(json.dumps, ROWS)).encode()
STEPS = {"num_steps": 24, "batch_size": 4, "num_evaluations": 3}
ENDLESS = {"num_steps": 100_000, "num_evaluations": 1}


def method_of(**hyperparameters: Any) -> dict[str, Any]:
    """A job's method, as on the wire."""
    return {"type": "residual", "residual": {"hyperparameters": STEPS | hyperparameters}}


def saved_after(step: int) -> Callable[[JobRecord], bool]:
    """Whether a job has a checkpoint of a later step."""
    return lambda job: job.state.is_ended or (job.checkpoint is not None and job.checkpoint.step > step)


def has_ended(job: JobRecord) -> bool:
    """Whether a job is over."""
    return job.state.is_ended


def spec_of(name: str | None, seed: int, **hyperparameters: Any) -> JobSpec:
    """What a job on the rows asks for."""
    return JobSpec(method_of(**hyperparameters), name, {"seed": seed, "publish_worse": True})


def quiet_version(model: FrozenModel, seed: int = 0, **hyperparameters: Any) -> str:
    """The prompt that such a job comes to where nothing happens to it, and nothing else runs."""
    job, task = make_job(model, spec_of(None, seed, **hyperparameters), JobData(CONTENT, None))
    return make_artifact(model, task, train(model, {"job": job})["job"]).version


@dataclass
class Site:
    """A store, as a server sees it, and workers to start over it."""

    folder: Path
    model_folder: Path
    model: FrozenModel
    store: EmbeddedStore = field(init=False)
    queue: JobQueue = field(init=False)

    def __post_init__(self) -> None:
        self.store = EmbeddedStore(self.folder / "store")
        self.queue = JobQueue(self.store, self.model.spec.fingerprint, check=check_spec)

    @property
    def log(self) -> str:
        """What the processes have said."""
        return (self.folder / "log").read_text()

    def process(self, command: str, **options: Any) -> Any:
        """A process over the store, as a context."""
        common = {"model": str(self.model_folder), "store": str(self.folder / "store"), "checkpoint_seconds": 0.0}
        return process(command, self.folder / "log", **(common | options))

    def worker(self, **options: Any) -> Any:
        """A worker's process, as a context."""
        return self.process("worker", **options)

    async def create(self, name: str, seed: int = 0, **hyperparameters: Any) -> JobRecord:
        """Create a job of the same rows."""
        digest = await self.queue.put_rows(TENANT, CONTENT)
        spec = replace(spec_of(name, seed, **hyperparameters), rows_digest=digest)
        return await self.queue.create(TENANT, JobRequest(spec))

    async def look(self, job: JobRecord) -> JobRecord:
        """The job as it is now."""
        return await self.queue.get(TENANT, job.id)

    async def until(self, job: JobRecord, holds: Callable[[JobRecord], bool], seconds: float = 60) -> JobRecord:
        """Wait until something holds of a job."""
        with anyio.move_on_after(seconds):
            while not holds(job := await self.look(job)):  # noqa: ASYNC110 - it changes in another process
                await anyio.sleep(0.02)
            return job
        pytest.fail(f"waited in vain: {job}\n{self.log}")

    async def version(self, job: JobRecord, seconds: float = 60) -> str:
        """Wait for a job's success and return its prompt's version."""
        ended = await self.until(job, has_ended, seconds)
        assert ended.result is not None, (ended.error, self.log)
        record = await PromptCatalog(self.store, self.model.spec).resolve(TENANT, ended.prompt_name)
        assert (record.number, record.version) == (1, ended.result.version)  # published once
        return record.version

    async def starts(self, job: JobRecord) -> list[str]:
        """What the log tells of each worker that took the job, oldest first."""
        events = await self.queue.events(TENANT, job.id)
        return [event.message for event in reversed(events) if event.message.startswith("A worker has started")]
