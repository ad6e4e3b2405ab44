"""Decoded prompts in host memory, least recently used out first, by bytes; concurrent loads of one become one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from promptd_store.artifact import PromptArtifact


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since the start, and the present size."""

    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    num_bytes: int = 0
    num_artifacts: int = 0


class ArtifactCache:
    """Lives on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._artifacts: OrderedDict[Hashable, PromptArtifact] = OrderedDict()
        self._loading: dict[Hashable, asyncio.Task[PromptArtifact]] = {}
        self._unwanted: set[Hashable] = set()
        self._num_bytes = self._num_hits = self._num_misses = self._num_evictions = 0

    @property
    def stats(self) -> CacheStats:
        """What happened so far."""
        return CacheStats(self._num_hits, self._num_misses, self._num_evictions, self._num_bytes, len(self._artifacts))

    @property
    def keys(self) -> list[Hashable]:
        """What is here or on its way."""
        return [*self._artifacts, *self._loading]

    async def get(self, key: Hashable, load: Callable[[], Awaitable[PromptArtifact]]) -> PromptArtifact:
        """Return the artifact, loading it where needed. A caller that goes away does not disturb the others."""
        found = self._artifacts.get(key)
        if found is not None:
            self._artifacts.move_to_end(key)
            self._num_hits += 1
            return found
        task = self._loading.get(key)
        if task is None:
            self._num_misses += 1
            task = asyncio.create_task(self._load(key, load))
            # Where every caller has gone, a failure has nobody left to be raised to.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._loading[key] = task
        return await asyncio.shield(task)

    def discard(self, key: Hashable) -> None:
        """Forget one artifact; one on its way is not kept."""
        self._unwanted |= {key} & set(self._loading)
        gone = self._artifacts.pop(key, None)
        if gone is not None:
            self._num_bytes -= gone.num_bytes

    async def _load(self, key: Hashable, load: Callable[[], Awaitable[PromptArtifact]]) -> PromptArtifact:
        try:
            artifact = await load()
            if key not in self._unwanted:
                self._keep(key, artifact)
        finally:
            del self._loading[key]
            self._unwanted.discard(key)
        return artifact

    def _keep(self, key: Hashable, artifact: PromptArtifact) -> None:
        if artifact.num_bytes > self._max_bytes:
            return
        self._artifacts[key] = artifact
        self._num_bytes += artifact.num_bytes
        while self._num_bytes > self._max_bytes:
            _, gone = self._artifacts.popitem(last=False)
            self._num_bytes -= gone.num_bytes
            self._num_evictions += 1
