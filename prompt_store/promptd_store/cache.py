"""Decoded prompts in host memory, by bytes; concurrent loads of one become one.

Where there is no room for all, those of an owner who has used none for a while leave, then those of the owner who holds
most; of each, the least recently used first. So one who goes through thousands of prompts evicts its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from promptd_store.artifact import PromptArtifact

ACTIVE_SECONDS = 60.0
"""An owner who has used nothing for so long has no claim to room any more."""


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

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._artifacts: dict[Hashable, tuple[str, PromptArtifact]] = {}
        self._by_owner: dict[str, OrderedDict[Hashable, None]] = {}  # least recently used first
        self._used_at: OrderedDict[str, float] = OrderedDict()  # those who hold some, least recently used first
        self._held: Counter[str] = Counter()  # bytes by owner
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

    async def get(
        self, key: Hashable, load: Callable[[], Awaitable[PromptArtifact]], *, owner: str = ""
    ) -> PromptArtifact:
        """Return the artifact, loading it where needed. A caller that goes away does not disturb the others."""
        found = self._artifacts.get(key)
        if found is not None:
            self._touch(key, found[0])
            self._num_hits += 1
            return found[1]
        task = self._loading.get(key)
        if task is None:
            self._num_misses += 1
            task = asyncio.create_task(self._load(key, load, owner))
            # Where every caller has gone, a failure has nobody left to be raised to.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._loading[key] = task
        return await asyncio.shield(task)

    def discard(self, key: Hashable) -> None:
        """Forget one artifact; one on its way is not kept."""
        self._unwanted |= {key} & set(self._loading)
        if key in self._artifacts:
            self._remove(key)

    async def _load(self, key: Hashable, load: Callable[[], Awaitable[PromptArtifact]], owner: str) -> PromptArtifact:
        try:
            artifact = await load()
            if key not in self._unwanted:
                self._keep(key, artifact, owner)
        finally:
            del self._loading[key]
            self._unwanted.discard(key)
        return artifact

    def _keep(self, key: Hashable, artifact: PromptArtifact, owner: str) -> None:
        if artifact.num_bytes > self._max_bytes:
            return
        self._artifacts[key] = owner, artifact
        self._by_owner.setdefault(owner, OrderedDict())
        self._touch(key, owner)
        self._held[owner] += artifact.num_bytes
        self._num_bytes += artifact.num_bytes
        while self._num_bytes > self._max_bytes:
            self._remove(self._victim(owner))
            self._num_evictions += 1

    def _touch(self, key: Hashable, owner: str) -> None:
        self._by_owner[owner][key] = None
        self._by_owner[owner].move_to_end(key)
        self._used_at[owner] = self._clock()
        self._used_at.move_to_end(owner)

    def _victim(self, asking: str) -> Hashable:
        """Choose what leaves for what was just loaded for `asking`; not that itself."""
        idle, used_at = next(iter(self._used_at.items()))
        if self._clock() - used_at > ACTIVE_SECONDS:
            return next(iter(self._by_owner[idle]))
        holders = [owner for owner, keys in self._by_owner.items() if owner != asking or len(keys) > 1]
        return next(iter(self._by_owner[max(holders, key=self._held.__getitem__)]))

    def _remove(self, key: Hashable) -> None:
        owner, artifact = self._artifacts.pop(key)
        del self._by_owner[owner][key]
        self._held[owner] -= artifact.num_bytes
        self._num_bytes -= artifact.num_bytes
        if not self._by_owner[owner]:
            del self._by_owner[owner], self._used_at[owner], self._held[owner]
