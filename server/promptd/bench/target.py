"""Who is asked: an engine in this process. `server` has the same over HTTP."""

from __future__ import annotations

import resource
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from promptd.bench.workload import BenchPrompt, BenchRequest

if TYPE_CHECKING:
    from promptd.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Reading:
    """What a target counts; None where it does not tell."""

    prompt_cache_hits: int | None = None
    prompt_cache_misses: int | None = None
    rss_bytes: int | None = None


class Target(Protocol):
    """Something that answers requests."""

    description: str
    vocab_size: int

    async def open(self, prompts: Sequence[BenchPrompt]) -> None:
        """Make the prompts known."""

    def stream(self, request: BenchRequest) -> AsyncIterator[int]:
        """Yield the number of new tokens, event by event; raises where the request fails."""

    async def read(self) -> Reading:
        """Read the counters, and the memory in use."""

    async def close(self) -> None:
        """Leave everything as it was."""


class EngineTarget:
    """An engine in this process, with its own thread, as the server runs it."""

    def __init__(self, engine: Engine) -> None:
        from promptd.engine.async_engine import AsyncEngine

        model = engine.model
        self.description = f"{model.served_name} in this process, {model.device}, {model.spec.serving_dtype}"
        self.vocab_size = model.spec.vocab_size
        self._engine = AsyncEngine(engine)

    async def open(self, prompts: Sequence[BenchPrompt]) -> None:
        """Start the engine's thread; the artifacts travel with the requests."""
        self._engine.start()

    async def stream(self, request: BenchRequest) -> AsyncIterator[int]:
        """Yield the number of new tokens, step by step."""
        from promptd.engine.request import GenerateRequest, SamplingParams

        params = SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True)
        artifact = request.prompt.artifact
        prompts = () if artifact is None else (artifact,)
        asked = GenerateRequest(uuid.uuid4().hex, request.token_ids, params, prompts)
        async for output in self._engine.submit(asked):
            yield len(output.token_ids)

    async def read(self) -> Reading:
        """Read the engine's counters and the largest memory use of this process so far."""
        stats = self._engine.stats()
        return Reading(stats.prompt_cache_hits, stats.prompt_cache_misses, peak_rss_bytes())

    async def close(self) -> None:
        """Stop the engine's thread."""
        await self._engine.shutdown()


def peak_rss_bytes() -> int:
    """Return the most memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
