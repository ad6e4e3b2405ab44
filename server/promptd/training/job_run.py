"""One job on one worker, from its claim to its end: rows and checkpoint in, progress out, a published prompt."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from promptd_store import (
    CheckFailedError,
    LeaseLostError,
    PromptArtifact,
    PromptCatalog,
    PromptRecord,
    StoreError,
    StoreUnavailableError,
    TenantErasedError,
)
from promptd_store.passing_thread import compute

from promptd.errors import ConflictError, OverloadedError
from promptd.jobs import HEARTBEAT_SECONDS, Claim, JobClaims, JobEvent, JobRecord, JobResult, JobState
from promptd.training.artifact import make_artifact, provenance
from promptd.training.counters import TrainingCounters
from promptd.training.job import CHECKPOINT_SECONDS, Progress, TrainingJob, Watcher
from promptd.training.job_prompts import load_prompts
from promptd.training.loop import TrainingLoop
from promptd.training.pace import Pace
from promptd.training.plan import make_job
from promptd.training.reasons import not_better, reason_of
from promptd.training.result import TrainingResult
from promptd.training.scores import Scores

REPORT_SECONDS = 1.0
"""Progress is written down this often; evaluations always are."""
SAVING_SHARE = 0.8
"""When this share of the time between two checkpoints has passed the next is begun: it is safe before all of it has."""
FIRST_CHECKPOINT_SECONDS = 1.0
"""An attempt's first one comes soon: a job that has saved is not suspected of taking its workers down."""
MAX_PUBLISH_TRIES = 20
GIVEN_UP = (LeaseLostError, ConflictError, TenantErasedError)
"""The job was taken by another worker, has been ended or paused by its owner, or erased."""

_T = TypeVar("_T")

Examine = Callable[[PromptArtifact, str], Awaitable[None]]
"""Raises what speaks against publishing an artifact for a tenant."""
Message = Progress | bytes | TrainingResult | Exception


class JobRun:
    """Owns the claim on one job. `look` asks it to look at the job's state at once."""

    def __init__(
        self,
        claims: JobClaims,
        catalog: PromptCatalog,
        loop: TrainingLoop,
        claim: Claim,
        *,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        examine: Examine | None = None,
        counters: TrainingCounters | None = None,
        on_cleared: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_cleared` is told when a suspected job has got on: the worker may take others now."""
        self.claim = claim
        self._on_cleared = on_cleared
        self._examine = examine
        self.look = asyncio.Event()
        self._claims = claims
        self._catalog = catalog
        self._loop = loop
        self._counters = counters or TrainingCounters()
        self._has_lease = True
        self._is_ending = False
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._checkpoint_seconds = SAVING_SHARE * checkpoint_seconds
        first_seconds = min(self._checkpoint_seconds, FIRST_CHECKPOINT_SECONDS)
        self._watcher = Watcher(self._put, self._put_checkpoint, first_seconds)
        self._events = asyncio.get_running_loop()
        self._saved = asyncio.Event()
        self._pace = Pace()
        self._reported = time.monotonic()

    async def run(self) -> None:
        """Run the job to its end, whatever that is; cancelled, let go of it for another worker."""
        keeper = asyncio.create_task(self._keep())
        trainer = asyncio.create_task(self._train())
        try:
            await asyncio.wait({keeper, trainer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not trainer.done():
                await self._let_go(trainer)
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if not trainer.cancelled():
            await trainer

    async def _keep(self) -> None:
        """Renew the lease from first to last; return when the job is no longer to be run."""
        while self.claim.job.state is JobState.RUNNING:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self.look.wait()
            self.look.clear()
            try:
                self.claim = await self._claims.heartbeat(self.claim)
            except LeaseLostError:
                if not self._is_ending:  # else the end of the job, which gives the lease back, says whether it was lost
                    self._note_lost()
                return
            except StoreError:  # the lease outlasts two missed heartbeats
                continue

    async def _let_go(self, trainer: asyncio.Task[None]) -> None:
        """Stop training at its next step, save where it may go on later, give the job back."""
        if self._pace.newest_step is not None and self.claim.job.state is not JobState.CANCELLING:
            self._saved.clear()
            self._watcher.checkpoint_seconds = -1.0
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._saved.wait()
        self._loop.remove(self.claim.job.id)
        trainer.cancel()
        await asyncio.gather(trainer, return_exceptions=True)
        await self._release()

    async def _release(self) -> None:
        with suppress(*GIVEN_UP):
            self._ended_as(await self._claims.release(self.claim))

    def _note_lost(self) -> None:
        self._counters.leases_lost += self._has_lease
        self._has_lease = False

    def _ended_as(self, job: JobRecord) -> None:
        self.claim = replace(self.claim, job=job)

    async def _train(self) -> None:
        try:
            replaced = await _patiently(self._enter)
            await self._publish(await self._follow(), replaced)
        except GIVEN_UP as error:
            if isinstance(error, LeaseLostError):
                self._note_lost()
            self._loop.remove(self.claim.job.id)
            await self._release()
        except Exception as error:  # noqa: BLE001 - whatever a job ends with is its reason, for its owner to read
            self._loop.remove(self.claim.job.id)
            self._is_ending = True
            with suppress(*GIVEN_UP):
                self._ended_as(await _patiently(partial(self._claims.fail, self.claim, reason_of(error))))
        finally:
            self._saved.set()

    async def _enter(self) -> PromptRecord | None:
        """Read rows, prompts and checkpoint, put the job into the loop; return the prompt that it would replace."""
        job, spec = self.claim.job, self.claim.job.spec
        data = await self._claims.data(self.claim)
        prompts, replaced = await load_prompts(self._catalog, job)
        checkpoint = await self._claims.load_checkpoint(self.claim)

        def make() -> TrainingJob:
            training, self._task = make_job(self._loop.model, spec, data, prompts)
            if checkpoint is not None:
                training.restore(checkpoint)
            return training

        # Put in from here and not by the thread: that one goes on when this task is cancelled.
        self._loop.add(job.id, await compute(make), self._watcher, self._put)
        return replaced

    def _put(self, message: Message) -> None:
        """Take a message of the training thread."""
        self._events.call_soon_threadsafe(self._messages.put_nowait, message)

    def _put_checkpoint(self, checkpoint: bytes) -> None:
        """Take a checkpoint; the next one is wanted when this one is safe, so that a slow store never has two."""
        self._watcher.on_checkpoint = None
        self._watcher.checkpoint_seconds = self._checkpoint_seconds
        self._put(checkpoint)

    async def _follow(self) -> TrainingResult:
        """Write down what the training thread tells, until it tells the end."""
        while True:
            message = await self._messages.get()
            if isinstance(message, TrainingResult):
                return message
            if isinstance(message, Exception):
                raise message
            if isinstance(message, bytes):
                step, was_suspect = self._pace.newest_step or 0, self.claim.is_suspect
                self.claim = await _patiently(partial(self._claims.save_checkpoint, self.claim, message, step))
                if was_suspect:
                    self._on_cleared()
                self._watcher.on_checkpoint = self._put_checkpoint
                self._saved.set()
            else:
                await self._progressed(message)

    async def _progressed(self, progress: Progress) -> None:
        self._pace.add(progress)
        self._counters.steps += 1
        self._counters.tokens += progress.num_tokens
        self._counters.step_seconds += progress.seconds
        now = time.monotonic()
        if progress.scores is None and now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        events = [] if progress.scores is None else [_evaluated(progress.step, progress.scores)]
        self.claim = await _patiently(partial(self._claims.report, self.claim, self._pace.told(), events))

    async def _publish(self, result: TrainingResult, replaced: PromptRecord | None) -> None:
        """Move the name to the new prompt, unless that is worse; the job's lease fences it."""
        job = self.claim.job
        must_be_better = not job.spec.settings.get("publish_worse", False)
        if must_be_better and result.report.rank < max(result.before.rank, result.bare.rank):
            raise not_better(job.spec, result, replaced)
        artifact = await compute(make_artifact, self._loop.model, self._task, result)
        facts = {**provenance(result), "job": job.id}
        for _ in range(MAX_PUBLISH_TRIES):
            checks = await _patiently(partial(self._claims.publication_checks, self.claim))
            with suppress(CheckFailedError):  # the job was written to in between, by its owner or a heartbeat
                publish = partial(
                    self._catalog.publish,
                    job.tenant,
                    job.prompt_name,
                    artifact.content,
                    provenance=facts,
                    sidecar=result.sidecar,
                    behind=job.spec.behind,
                    user=job.user,
                    checks=checks,
                    examine=self._examined,
                )
                record = await _patiently(publish)
                break
        else:
            raise ConflictError(f"job {job.id!r} is written to all the time", code="job_state_conflict")
        published = JobResult(
            prompt=record.name,
            version=record.version,
            number=record.number,
            best_step=result.best_step,
            seed=result.config.seed,
            data_digest=result.data_digest,
            scores_before=_numbers(result.before),
            scores_after=_numbers(result.report),
        )
        self._is_ending = True
        self._ended_as(await _patiently(partial(self._claims.finish, self.claim, published)))

    async def _examined(self, artifact: PromptArtifact) -> None:
        if self._examine is not None:
            await _patiently(partial(self._examine, artifact, self.claim.job.tenant), OverloadedError)


async def _patiently(step: Callable[[], Awaitable[_T]], passing: type[Exception] = StoreUnavailableError) -> _T:
    """Repeat a step until what passes has passed: no job fails for want of a store, or because a server is busy.

    Every step may be repeated: it is fenced by the lease, or changes nothing the second time.
    """
    while True:
        try:
            return await step()
        except passing:
            await asyncio.sleep(random.uniform(0.5, 1.5))


def _evaluated(step: int, scores: Scores) -> JobEvent:
    accuracy = "" if scores.accuracy is None else f", accuracy {scores.accuracy:.3f}"
    return JobEvent(f"Step {step}: validation loss {scores.loss:.4f}{accuracy}", data=_numbers(scores))


def _numbers(scores: Scores) -> dict[str, float]:
    return {name: value for name, value in scores.to_json().items() if value is not None}
