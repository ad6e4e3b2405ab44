"""Jobs from the queue to a served prompt, on the engine's own thread, beside requests."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from promptd_store import EmbeddedStore, PromptArtifact, PromptCatalog

from promptd.engine.async_engine import AsyncEngine
from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, SamplingParams
from promptd.jobs import JobClaims, JobQueue, JobRecord, JobRequest, JobSpec, JobState
from promptd.modeling import FrozenModel
from promptd.training import METHODS, TrainingLoop, TrainingWorker, trainer
from promptd.training import job as job_module
from promptd.training.job_spec import check_spec
from promptd.training.passes import run_what_fits

LABELS = ("weather", "music")
ROWS = [
    {"text": f"{verb} {thing} number {n}", "label": LABELS[thing == "song"]}
    for n in range(10)
    for verb, thing in (("is there", "rain"), ("play a", "song"))
]
NUMBERS = itertools.count()
PATIENCE_SECONDS = 60
FAST = {"num_steps": 6, "batch_size": 4, "num_evaluations": 2}


@dataclass
class House:
    """A server without HTTP."""

    engine: AsyncEngine
    training: TrainingLoop
    queue: JobQueue
    claims: JobClaims
    catalog: PromptCatalog
    errors: list[BaseException]

    async def create(self, rows: list[dict[str, Any]] | None = ROWS, tenant: str = "acme", **spec: Any) -> JobRecord:
        """Create a job of rows given inline."""
        digest = None
        if rows is not None:
            digest = await self.queue.put_rows(tenant, b"\n".join(json.dumps(row).encode() for row in rows))
        settings = FAST | spec.pop("settings", {})
        gate = {"publish_worse": settings.pop("publish_worse", True)}
        name, own = spec.pop("method", ("residual", {}))
        method = {"type": name, name: {"hyperparameters": settings | own}}
        return await self.queue.create(tenant, JobRequest(JobSpec(method, settings=gate, rows_digest=digest, **spec)))

    async def ended(self, job: JobRecord) -> JobRecord:
        """Wait for a job's end."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for _ in self.queue.follow(job.tenant, job.id):
                pass
        return await self.queue.get(job.tenant, job.id)

    async def until(self, job: JobRecord, holds: Callable[[JobRecord], bool]) -> JobRecord:
        """Wait until something holds of a job."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holds(job := await self.queue.get(job.tenant, job.id)):  # noqa: ASYNC110 - many things to wait for
                await asyncio.sleep(0.01)
        return job

    async def say(self, *names: str, num_tokens: int = 8) -> list[int]:
        """Generate greedily under a chain of prompts, as names mean it."""
        chain = await self.catalog.chain("acme", names)
        return await self.answer([await self.catalog.load(record) for record in chain], num_tokens)

    async def answer(self, chain: Sequence[PromptArtifact], num_tokens: int = 8) -> list[int]:
        """Generate greedily under a chain of artifacts."""
        ids = tuple(self.engine.engine.model.encode("is there rain"))
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        request = GenerateRequest(f"say-{next(NUMBERS)}", ids, params, prompts=tuple(chain))
        return [token async for output in self.engine.submit(request) for token in output.token_ids]


@asynccontextmanager
async def house(model: FrozenModel, folder: Path) -> AsyncIterator[House]:
    """Open a house, close it in the order of the server."""
    store = EmbeddedStore(folder)
    loop = TrainingLoop(model)
    engine = AsyncEngine(Engine(model, EngineConfig(kv_cache_bytes=1 << 22, prompt_cache_bytes=1 << 22)), loop)
    engine.start()
    catalog = PromptCatalog(store, model.spec)
    queue = JobQueue(store, model.spec.fingerprint, check=check_spec)
    claims = JobClaims(store, model.spec.fingerprint, "worker-1")
    errors: list[BaseException] = []
    worker = asyncio.create_task(TrainingWorker(claims, catalog, loop, on_error=errors.append).run())
    try:
        yield House(engine, loop, queue, claims, catalog, errors)
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
        await engine.shutdown()
        await store.close()
        assert not errors


def test_a_job_becomes_a_served_prompt(llama: FrozenModel, tmp_path: Path) -> None:
    """Rows in, a prompt out under its name, with scores, seed and digest; the engine answers with it at once."""

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            job = await home.ended(await home.create(name="intent", settings={"num_steps": 30}))
            assert job.state is JobState.SUCCEEDED and job.result is not None, job.error
            record = await home.catalog.resolve("acme", "intent")
            assert record.version == job.result.version
            assert record.provenance is not None and record.provenance["job"] == job.id
            assert record.provenance["scores"]["after"]["accuracy"] == job.result.scores_after["accuracy"]
            artifact = await home.catalog.load(record)
            assert artifact.manifest.label_words == {"music": " music", "weather": " weather"}
            assert await home.say("intent") != await home.say()
            kinds = [event.kind for event in await home.queue.events("acme", job.id)]
            assert kinds.count("metrics") >= 2 and kinds[0] == "state"

    asyncio.run(story())


def test_jobs_of_all_methods_run_at_once_beside_requests(llama: FrozenModel, tmp_path: Path) -> None:
    """Seven methods, seven prompts; requests that run meanwhile get the answers of an idle engine."""

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            expected = await home.say(num_tokens=24)
            jobs = [await home.create(name=f"of-{name}", method=(name, {})) for name in METHODS]
            await home.until(jobs[-1], lambda job: job.progress is not None)
            for _ in range(5):
                assert await home.say(num_tokens=24) == expected
            for job in jobs:
                ended = await home.ended(job)
                assert ended.state is JobState.SUCCEEDED, ended.error
            answers = {tuple(await home.say(f"of-{name}")) for name in METHODS}
            assert len(answers) > 1

    asyncio.run(story())


LONG = {"num_steps": 100_000, "num_evaluations": 1}


def test_cancel_takes_effect_within_a_pass(llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of many passes ends behind the one that runs: the job is cancelled and has published nothing."""
    num_passes, is_slow = 0, False
    begun, go_on = threading.Event(), threading.Event()

    def counted(model: FrozenModel, shares: Sequence[Any], *args: Any) -> Any:
        nonlocal num_passes
        num_passes += len(shares)
        if is_slow:
            begun.set()
            go_on.wait(PATIENCE_SECONDS)
        return run_what_fits(model, shares, *args)

    async def story() -> None:
        nonlocal is_slow
        async with house(llama, tmp_path) as home:
            job = await home.create(name="never", settings={**LONG, "batch_size": 16})
            await home.until(job, lambda job: job.progress is not None)
            is_slow = True
            assert await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
            before = num_passes
            await home.queue.cancel("acme", job.id)
            assert (await home.ended(job)).state is JobState.CANCELLED  # nobody waits for the pass
            go_on.set()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while home.training.has_work:  # noqa: ASYNC110 - it ends in another thread
                    await asyncio.sleep(0.005)
            assert num_passes == before
            assert not await home.catalog.list("acme")

    monkeypatch.setattr(trainer, "run_what_fits", counted)
    monkeypatch.setattr(job_module, "MAX_SHARE_TOKENS", 1)  # a step takes a pass for each of its rows
    asyncio.run(story())


def test_pause_and_resume_go_on_where_they_were(llama: FrozenModel, tmp_path: Path) -> None:
    """A paused job keeps a checkpoint of its last step; resumed, it goes on from there."""

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            job = await home.create(name="later", settings=LONG)
            await home.until(job, lambda job: job.progress is not None and job.progress.step > 3)
            await home.queue.pause("acme", job.id)
            await home.until(job, lambda job: job.state is JobState.PAUSED)
            paused = await home.until(
                job, lambda job: not any(task.get_name() == job.id for task in asyncio.all_tasks())
            )
            assert paused.checkpoint is not None and paused.checkpoint.step > 3
            await home.queue.resume("acme", job.id)
            step = paused.checkpoint.step
            await home.until(job, lambda job: job.progress is not None and job.progress.step > step)
            messages = [event.message for event in await home.queue.events("acme", job.id)]
            assert any(f"continuing after step {step}" in message for message in messages)
            await home.queue.cancel("acme", job.id)
            await home.ended(job)

    asyncio.run(story())


def test_a_worker_that_stops_hands_its_job_to_the_next(llama: FrozenModel, tmp_path: Path) -> None:
    """The next worker goes on from the checkpoint, and the prompt is the one of an unbroken run."""

    async def broken() -> str:
        settings = {"num_steps": 60, "num_evaluations": 3}
        async with house(llama, tmp_path / "broken") as home:
            job = await home.create(name="prompt", settings=settings)
            await home.until(job, lambda job: job.progress is not None and job.progress.step > 2)
        async with house(llama, tmp_path / "broken") as home:
            job = await home.ended(job)
            assert job.state is JobState.SUCCEEDED, job.error
            messages = [event.message for event in await home.queue.events("acme", job.id)]
            assert any("continuing after step" in message for message in messages)
            return (await home.catalog.resolve("acme", "prompt")).version

    async def unbroken() -> str:
        async with house(llama, tmp_path / "unbroken") as home:
            await home.ended(await home.create(name="prompt", settings={"num_steps": 60, "num_evaluations": 3}))
            return (await home.catalog.resolve("acme", "prompt")).version

    assert asyncio.run(broken()) == asyncio.run(unbroken())


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"rows": [{"text": "a", "label": "x"}]}, "invalid_training_data", "different labels"),
        ({"rows": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]}, "invalid_value", "too few"),
        ({"rows": [{"text": f"a {n}", "label": "x"} for n in range(20)]}, "invalid_training_data", "different labels"),
        ({"rows": [*ROWS, {"text": "a"}]}, "invalid_training_data", "line 21"),
        ({"label_words": {"weather": " w", "rain": " r"}}, "invalid_training_data", "'music' has no label word"),
        ({"rows": [{"text": f"word {n} " * 400, "label": LABELS[n % 2]} for n in range(20)]}, "invalid_training_data",
         "exceed"),
        ({"base_prompt": "nobody"}, "prompt_not_found", "no prompt 'nobody'"),
        ({"method": ("prompt_tuning", {"learning_rate": 1e37}),
          "settings": {"num_steps": 50, "warmup_ratio": 0.0}}, "numerical_error", "smaller learning_rate"),
    ],
    ids=["one row", "two rows", "one class", "no target", "unknown label", "too long", "no base prompt", "diverges"],
)  # fmt: skip
def test_a_bad_job_fails_with_a_reason(
    llama: FrozenModel, tmp_path: Path, changes: dict[str, Any], code: str, told: str
) -> None:
    """What a person must know is in the job's error; a good job beside it is not touched."""

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            good = await home.create(name="good")
            bad = await home.ended(await home.create(name="bad", **changes))
            assert bad.state is JobState.FAILED and bad.error is not None
            assert bad.error.code == code and told in bad.error.message
            assert (await home.ended(good)).state is JobState.SUCCEEDED

    asyncio.run(story())


def test_a_worse_prompt_is_not_published(llama: FrozenModel, tmp_path: Path) -> None:
    """The gate: what serves now stays, the job says why; told otherwise it publishes."""
    steps = {"num_steps": 40, "num_evaluations": 4, "batch_size": 8}
    still = ("prompt_tuning", {"learning_rate": 1e-30})

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            first = await home.ended(await home.create(name="intent", settings=steps))
            assert first.result is not None
            gate = {"publish_worse": False}
            worse = await home.ended(await home.create(name="intent", method=still, settings=gate))
            assert worse.state is JobState.FAILED and worse.error is not None
            assert worse.error.code == "prompt_not_better" and "intent@1" in worse.error.message
            assert (await home.catalog.resolve("acme", "intent")).version == first.result.version
            forced = await home.ended(await home.create(name="intent", method=still))
            assert forced.result is not None and forced.result.number == 2

    asyncio.run(story())
