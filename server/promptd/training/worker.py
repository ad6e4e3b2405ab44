"""Takes jobs from the queue and runs as many at once as share the model well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from promptd_store import PromptCatalog, StoreError

from promptd.jobs import Claim, JobClaims, JobRecord
from promptd.training.counters import TrainingCounters
from promptd.training.job import CHECKPOINT_SECONDS
from promptd.training.job_run import Examine, JobRun
from promptd.training.loop import TrainingLoop

MAX_JOBS = 16
POLL_SECONDS = 2.0
"""How often the queue is looked at where no signal comes."""


class TrainingWorker:
    """Runs up to `max_jobs` jobs of one base model. `run` is the whole of it; cancelled, it lets go of all jobs.

    `examine` has the last word on a prompt before it is published.
    `on_job` is told of every job when it begins and when this worker is done with it.
    """

    def __init__(
        self,
        claims: JobClaims,
        catalog: PromptCatalog,
        loop: TrainingLoop,
        *,
        max_jobs: int = MAX_JOBS,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        examine: Examine | None = None,
        on_job: Callable[[JobRecord], None] = lambda job: None,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._claims = claims
        self._catalog = catalog
        self._loop = loop
        self._max_jobs = max_jobs
        self._checkpoint_seconds = checkpoint_seconds
        self._examine = examine
        self._on_job = on_job
        self._on_error = on_error
        self.counters = TrainingCounters()
        self._runs: dict[asyncio.Task[None], JobRun] = {}
        self._signal = asyncio.Event()

    @property
    def num_running(self) -> int:
        """Jobs that are here now."""
        return len(self._runs)

    async def run(self) -> None:
        """Claim and run jobs until cancelled."""
        listener = asyncio.create_task(self._listen())
        try:
            while True:
                self._signal.clear()
                try:
                    beside = [run.claim for run in self._runs.values()]
                    for claim in await self._claims.claim(self._max_jobs - len(beside), beside):
                        self._start(claim)
                except StoreError as error:
                    self._on_error(error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._signal.wait()
        finally:
            tasks = [listener, *self._runs]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> None:
        """Look at the queue, and at every running job, as soon as the state of any job changes."""
        subscription = await self._catalog.store.subscribe(self._claims.signals_log)
        try:
            async for _ in subscription:
                self._signal.set()
                for run in self._runs.values():
                    run.look.set()
        finally:
            await subscription.aclose()

    def _start(self, claim: Claim) -> None:
        self._on_job(claim.job)
        run = JobRun(
            self._claims,
            self._catalog,
            self._loop,
            claim,
            checkpoint_seconds=self._checkpoint_seconds,
            examine=self._examine,
            counters=self.counters,
            on_cleared=self._signal.set,
        )
        task = asyncio.create_task(run.run(), name=claim.job.id)
        self._runs[task] = run
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        job = self._runs.pop(task).claim.job
        self.counters.left[job.state.value] += 1
        self._on_job(job)
        self._signal.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)
