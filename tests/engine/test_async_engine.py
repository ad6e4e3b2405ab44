"""The engine's thread as asyncio sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from promptd.engine.async_engine import AsyncEngine
from promptd.engine.request import GenerateRequest, ScoreRequest
from promptd.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    PromptdError,
    ShuttingDownError,
)
from tests.engine.harness import Case, assert_matches_oracle, greedy, library, make_engine

TEXT = tuple(range(5, 25))


@asynccontextmanager
async def started(folder: Path, **limits: int) -> AsyncIterator[AsyncEngine]:
    """A running engine over a tiny model, stopped afterwards."""
    engine = AsyncEngine(make_engine(folder, **limits))  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


async def collect(engine: AsyncEngine, case: Case, request_id: str) -> None:
    """Stream one case to its end."""
    async for output in engine.submit(GenerateRequest(request_id, case.token_ids, case.params, case.prompts)):
        case.outputs.append(output)


def go(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine with a time limit."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(bounded())


def test_concurrent_streams_are_exact(tiny_models: dict[str, Path]) -> None:
    """Streams of different prompts run together and each gets the oracle's tokens."""
    folder = tiny_models["llama"]

    async def main() -> None:
        async with started(folder) as engine:
            cases = [Case((prompt,), TEXT, greedy(8)) for prompt in library(folder)]
            await asyncio.gather(*(collect(engine, case, f"r{n}") for n, case in enumerate(cases)))
            score = await engine.score(ScoreRequest("s", TEXT, ((7,), (8, 9))))
            assert len(score.logprobs) == 2
            assert engine.stats().steps < 8 * len(cases)  # control: they really shared steps
            for case in cases:
                assert len(case.tokens) == 8
                assert_matches_oracle(folder, case)

    go(main)


def test_errors_come_at_once_or_from_the_stream(tiny_models: dict[str, Path]) -> None:
    """What can be known before running is raised by submit; deadlines by the iteration."""

    async def main() -> None:
        async with started(tiny_models["llama"], max_queue=2, max_num_seqs=1) as engine:
            with pytest.raises(ContextLengthError):
                engine.submit(GenerateRequest("a", TEXT, greedy(10_000)))
            late = engine.submit(GenerateRequest("late", TEXT, greedy(5), deadline_seconds=0.0))
            with pytest.raises(PromptdError, match="deadline"):
                await anext(late)
            held = engine.submit(GenerateRequest("held", TEXT, greedy(200)))
            await anext(held)
            waiting = [engine.submit(GenerateRequest(f"w{n}", TEXT, greedy(1))) for n in range(2)]
            with pytest.raises(InvalidRequestError):
                engine.submit(GenerateRequest("held", TEXT, greedy(1)))
            with pytest.raises(OverloadedError):
                engine.submit(GenerateRequest("one-too-many", TEXT, greedy(1)))
            held.abort()
            for stream in waiting:
                assert (await anext(stream)).is_last

    go(main)


def test_a_cancelled_task_frees_its_row(tiny_models: dict[str, Path]) -> None:
    """A client that goes away frees its row and blocks at the next step; with the abort undone it would run on."""

    async def main() -> None:
        async with started(tiny_models["llama"]) as engine:
            case = Case((), TEXT, greedy(200))
            task = asyncio.create_task(collect(engine, case, "gone"))
            await until(lambda: len(case.outputs) > 2)
            task.cancel()
            await until(lambda: engine.stats().num_requests_running == 0)
            assert engine.stats().requests_aborted == 1
            assert engine.stats().kv_cache_usage_ratio == 0
            assert len(case.outputs) < 200
            assert engine.seconds_since_progress() == 0.0

    go(main)


@pytest.mark.parametrize("by", ["stream", "engine"])
def test_an_abort_ends_the_waiting_of_another_task(tiny_models: dict[str, Path], by: str) -> None:
    """Whoever waits for outputs of a request that is aborted elsewhere finds the end, and does not wait for ever."""

    async def main() -> None:
        async with started(tiny_models["llama"], max_num_seqs=1) as engine:
            held = engine.submit(GenerateRequest("held", TEXT, greedy(200)))
            stream = engine.submit(GenerateRequest("a", TEXT, greedy(5)))
            waiting = asyncio.create_task(stream.next_output())
            await asyncio.sleep(0.02)
            assert not waiting.done()
            if by == "stream":
                stream.abort()
            else:
                engine.abort("a")
            assert await waiting is None
            held.abort()

    go(main)


@pytest.mark.parametrize("drain_seconds", [60.0, 0.0])
def test_shutdown_answers_everyone(tiny_models: dict[str, Path], drain_seconds: float) -> None:
    """Draining finishes what fits into its time; the rest gets a typed error; new requests are refused."""

    async def main() -> None:
        engine = AsyncEngine(make_engine(tiny_models["llama"], max_num_seqs=2))
        engine.start()
        case = Case((), TEXT, greedy(230))
        task = asyncio.create_task(collect(engine, case, "open"))
        await until(lambda: len(case.outputs) > 1)
        stop = asyncio.create_task(engine.shutdown(drain_seconds=drain_seconds))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDownError):
            engine.submit(GenerateRequest("new", TEXT, greedy(1)))
        await stop
        if drain_seconds:
            await task
            assert case.outputs[-1].is_last  # type: ignore[union-attr]
        else:
            with pytest.raises(ShuttingDownError):
                await task

    go(main)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_answers_everyone(tiny_models: dict[str, Path]) -> None:
    """Design invariant 3: when the engine dies, every open request gets a typed error, later ones at once."""

    async def main() -> None:
        engine = AsyncEngine(make_engine(tiny_models["llama"]))
        engine.start()
        case = Case((), TEXT, greedy(200))
        task = asyncio.create_task(collect(engine, case, "a"))
        await until(lambda: len(case.outputs) > 1)
        engine.engine.scheduler.running[0].blocks = None  # type: ignore[assignment]
        with pytest.raises(EngineDeadError):
            await task
        with pytest.raises(EngineDeadError):
            engine.submit(GenerateRequest("b", TEXT, greedy(1)))
        assert engine.seconds_since_progress() == float("inf")
        await engine.shutdown()

    go(main)
