"""The host-side artifact cache: bounded by bytes, fair to its owners, one load for many callers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch
from promptd_store import ArtifactCache, PromptArtifact, PromptCatalog, Store, encode
from promptd_store.cache import ACTIVE_SECONDS

from tests.store.files import SPEC, soft, soft_file

pytestmark = pytest.mark.anyio

SIZE = encode("soft", soft()).num_bytes


def loader(seed: int, calls: list[int]) -> Callable[[], Awaitable[PromptArtifact]]:
    """A slow load that leaves a trace."""

    async def load() -> PromptArtifact:
        calls.append(seed)
        await asyncio.sleep(0.005)
        return encode("soft", soft(seed=seed))

    return load


async def test_oldest_goes_first() -> None:
    """The budget holds after every load; what was used last stays."""
    cache, calls = ArtifactCache(2 * SIZE), []
    for seed in (1, 2, 1, 3, 1, 2):
        await cache.get(seed, loader(seed, calls))
        assert cache.stats.num_bytes <= 2 * SIZE
    assert calls == [1, 2, 3, 2]
    stats = cache.stats
    assert (stats.num_hits, stats.num_misses, stats.num_evictions) == (2, 4, 2)
    assert (stats.num_artifacts, stats.num_bytes) == (2, 2 * SIZE)


async def test_churn_evicts_ones_own() -> None:
    """One who goes through many evicts its own; another's stays, until that one has used nothing for a while."""
    now, calls = [0.0], list[int]()
    cache = ArtifactCache(4 * SIZE, clock=lambda: now[0])
    for seed in (1, 2):
        await cache.get(("b", seed), loader(seed, calls), owner="b")
    for seed in range(10, 20):
        await cache.get(("a", seed), loader(seed, calls), owner="a")
    calls.clear()
    for seed in (1, 2):
        await cache.get(("b", seed), loader(seed, calls), owner="b")
    await cache.get(("a", 19), loader(19, calls), owner="a")
    assert calls == [] and cache.stats.num_artifacts == 4
    now[0] += ACTIVE_SECONDS + 1
    for seed in range(20, 24):
        await cache.get(("a", seed), loader(seed, calls), owner="a")
    assert {key[0] for key in cache.keys} == {"a"}  # type: ignore[index]
    await cache.get(("b", 1), loader(1, calls), owner="b")
    assert calls == [20, 21, 22, 23, 1]


async def test_a_large_one_finds_room() -> None:
    """It is kept though its owner holds most with it alone; it leaves when another needs the room."""
    calls, large = list[int](), encode("soft", torch.cat([soft()] * 9))
    cache = ArtifactCache(large.num_bytes + SIZE)

    async def load() -> PromptArtifact:
        return large

    for seed in (1, 2):
        await cache.get(("b", seed), loader(seed, calls), owner="b")
    await cache.get("large", load, owner="a")
    assert ("large" in cache.keys, cache.stats.num_artifacts) == (True, 2)
    for seed in (1, 2):
        await cache.get(("b", seed), loader(seed, calls), owner="b")
    assert "large" not in cache.keys


async def test_too_large_is_served_but_not_kept() -> None:
    """An artifact beyond the whole budget evicts nothing and is loaded each time."""
    cache, calls = ArtifactCache(SIZE - 1), []
    for _ in range(2):
        assert (await cache.get("a", loader(1, calls))).version == encode("soft", soft(seed=1)).version
    assert calls == [1, 1] and cache.stats.num_bytes == 0


async def test_concurrent_loads_are_one() -> None:
    """Many callers of one artifact share one load; a caller that is cancelled does not disturb the others."""
    cache, calls = ArtifactCache(10 * SIZE), []
    tasks = [asyncio.create_task(cache.get("a", loader(1, calls))) for _ in range(20)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    loaded = await asyncio.gather(*tasks, return_exceptions=True)
    assert calls == [1]
    assert isinstance(loaded[0], asyncio.CancelledError) and all(one is loaded[1] for one in loaded[1:])


async def test_failed_load_is_told_to_all_and_forgotten() -> None:
    """Every waiting caller gets the error; the next one tries again."""
    cache = ArtifactCache(10 * SIZE)
    calls: list[int] = []

    async def fail() -> PromptArtifact:
        await asyncio.sleep(0.001)
        raise OSError("disk")

    results = await asyncio.gather(*(cache.get("a", fail) for _ in range(3)), return_exceptions=True)
    assert [type(one) for one in results] == [OSError] * 3
    await cache.get("a", loader(1, calls))
    assert calls == [1]


async def test_discard() -> None:
    """A discarded artifact gives its bytes back; discarding an unknown one is harmless."""
    cache, calls = ArtifactCache(10 * SIZE), []
    await cache.get("a", loader(1, calls))
    cache.discard("a")
    cache.discard("a")
    assert cache.stats.num_bytes == 0
    await cache.get("a", loader(1, calls))
    assert calls == [1, 1]


async def test_catalog_loads_from_memory(catalog: PromptCatalog, store: Store) -> None:
    """A resident prompt needs no disk; tenants with equal bytes have entries of their own."""
    record = await catalog.publish("acme", "tone", soft_file(1))
    first = await catalog.load(record)
    await store.delete_blob("acme", record.content_digest)
    assert await catalog.load(await catalog.resolve("acme", "tone")) is first
    twin = await catalog.publish("eve", "tone", soft_file(1))
    assert twin.version == record.version and await catalog.load(twin) is not first
    assert catalog.cache_stats.num_artifacts == 2


async def test_small_catalog_cache_still_serves(store: Store) -> None:
    """A cache of zero bytes loads every time and is right every time."""
    catalog = PromptCatalog(store, SPEC, cache_bytes=0)
    for seed in range(3):
        record = await catalog.publish("acme", f"p{seed}", soft_file(seed))
        assert (await catalog.load(record)).content == soft_file(seed)
    assert catalog.cache_stats.num_artifacts == 0


async def test_tenants_keep_what_they_use(store: Store) -> None:
    """One tenant goes through many prompts; another's is still decoded."""
    catalog = PromptCatalog(store, SPEC, cache_bytes=int(3.5 * SIZE))
    kept = await catalog.publish("b", "p", soft_file(0))
    await catalog.load(kept)
    for seed in range(1, 8):
        await catalog.load(await catalog.publish("a", f"p{seed}", soft_file(seed)))
    before = catalog.cache_stats
    await catalog.load(kept)
    assert before.num_evictions > 0 and catalog.cache_stats.num_misses == before.num_misses
