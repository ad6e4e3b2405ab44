"""Publications while the power fails: what was acknowledged is there, whole, and nothing points to what is not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from promptd_store import PromptCatalog, find_faults
from promptd_store.objects import FolderObjects
from promptd_store.redis_backend.store import RedisStore

from tests.cluster.acknowledged import broken
from tests.power import OwnSyncs, build_recorder, cut_redis
from tests.redis_server import RedisServer, running_redis
from tests.store.files import SPEC, soft_file

WRITE_SECONDS = 120
"""How long the writers may take between two cuts."""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that writes down what Redis has synced."""
    return build_recorder(tmp_path_factory.mktemp("recorder"))


async def write_and_kill(server: RedisServer, blobs: Path, count: int, first: int) -> list[tuple[str, str]]:
    """Publish, files into Redis and beside it, and kill Redis amid it; return what was acknowledged."""
    acknowledged: list[tuple[str, str]] = []
    async with AsyncExitStack() as stack:
        catalogs = []
        for size in (0, 1 << 20):
            objects = FolderObjects(blobs)
            store = await RedisStore.open(server.url, objects=objects, inline_bytes=size, allow_volatile=True)
            stack.push_async_callback(store.close)
            catalogs.append(PromptCatalog(store, SPEC))

        async def publish(number: int) -> None:
            record = await catalogs[number % 2].publish("default", f"p{number % 7}", soft_file(number))
            acknowledged.append((record.name, record.version))

        writers = asyncio.gather(*(publish(first + number) for number in range(3 * count)), return_exceptions=True)
        async with asyncio.timeout(WRITE_SECONDS):
            while len(acknowledged) < count:
                assert not writers.done(), writers.result()[:3]
                await asyncio.sleep(0.001)
        kept = list(acknowledged)
        await asyncio.to_thread(server.kill)
        await writers
    return kept


async def look(server: RedisServer, blobs: Path, acknowledged: list[tuple[str, str]]) -> int:
    """How many of these are gone; nothing that is left may point to what is not."""
    store = await RedisStore.open(server.url, objects=FolderObjects(blobs), allow_volatile=True)
    try:
        lost = len(await broken(PromptCatalog(store, SPEC), acknowledged))
        assert [fault async for fault in find_faults(store)] == []
        return lost
    finally:
        await store.close()


def lost_at_power_cuts(
    folder: Path, recorder: Path, monkeypatch: pytest.MonkeyPatch, fsync: str, *, count: int = 100, num_cuts: int = 1
) -> int:
    """Write, pull the plug amid it, start again on what was synced, so many times; return what is gone of it all."""
    log, redis, blobs = folder / "synced", folder / "redis", folder / "blobs"
    monkeypatch.setenv("LD_PRELOAD", str(recorder))
    monkeypatch.setenv("SYNC_LOG", str(log))
    folder.mkdir()
    syncs = OwnSyncs(monkeypatch)
    acknowledged: list[tuple[str, str]] = []
    num_bytes = num_files = 0
    with running_redis(redis, appendfsync=fsync) as server:
        for number in range(num_cuts):
            acknowledged += asyncio.run(write_and_kill(server, blobs, count, first=3 * count * number))
            num_bytes += cut_redis(redis, log)
            num_files += syncs.cut(blobs)
            server.start()
        lost = asyncio.run(look(server, blobs, acknowledged))
    print(
        f"{num_cuts} power cuts, appendfsync {fsync}: {lost} of {len(acknowledged)} lost; what was never synced: "
        f"{num_bytes} bytes of Redis, {num_files} blobs"
    )
    return lost


def test_a_power_cut_loses_nothing(tmp_path: Path, recorder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that were not synced are dropped: with `appendfsync always` none of them was acknowledged.

    The control is a Redis that leaves syncing to the system: it loses everything.
    """
    assert lost_at_power_cuts(tmp_path / "always", recorder, monkeypatch, "always") == 0
    assert lost_at_power_cuts(tmp_path / "no", recorder, monkeypatch, "no") >= 90


@pytest.mark.long
def test_fifty_power_cuts(tmp_path: Path, recorder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 publications and 50 power cuts over one store."""
    assert lost_at_power_cuts(tmp_path / "always", recorder, monkeypatch, "always", count=200, num_cuts=50) == 0
