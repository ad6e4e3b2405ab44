"""Blobs of the Redis store, wherever they lie: damaged, lost, deleted while written, left behind by the dead."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from promptd_store import BlobCorruptError, BlobNotFoundError, StoreUnavailableError, VolatileStoreError
from promptd_store.objects import BucketObjects, FolderObjects, Objects
from promptd_store.redis_backend.store import RedisStore

from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    """A store of a test's own in the Redis of the session."""
    return f"{redis_server.url}?prefix=blobs-{secrets.token_hex(8)}:"


@pytest.fixture(params=["in Redis", "in a folder", "in memory", pytest.param("in a bucket", marks=pytest.mark.long)])
async def store(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> AsyncIterator[RedisStore]:
    """A store for each place that blobs may lie in; memory is fsspec's own, the bucket that of an S3 server."""
    objects: Objects | None = None
    if request.param == "in a folder":
        objects = FolderObjects(tmp_path / "blobs")
    elif request.param == "in memory":
        objects = BucketObjects(f"memory://{secrets.token_hex(8)}/blobs")
    elif request.param == "in a bucket":
        objects = BucketObjects(request.getfixturevalue("bucket"))
    opened = await RedisStore.open(url, objects=objects, inline_bytes=100)
    yield opened
    await opened.close()


async def damage(store: RedisStore, digest: str, data: bytes | None) -> None:
    """Change the stored bytes behind the store's back; None takes them away."""
    found = await store._blobs._entries("acme")
    (entry,) = [entry for name, entry in found if "sha256:" + name == digest]
    place = entry.split(b" ", 2)[2].decode()
    if not place:
        key = f"{store.target.prefix}blob:acme:{digest[7:]}"
        await (store._link.command("DEL", key) if data is None else store._link.command("SET", key, data))
    else:
        assert store._blobs._objects is not None
        store._blobs._objects.delete(place)
        if data is not None:
            store._blobs._objects.put(place, data)


@pytest.mark.parametrize("changed", [b"", b"evil" * 50, b"x" * 1000])
async def test_corrupt_blob_is_never_served(store: RedisStore, changed: bytes) -> None:
    """Changed bytes are a typed error, they are set aside, and the same content can be stored again."""
    data = bytes(200)
    digest = await store.put_blob("acme", data)
    await damage(store, digest, changed)
    with pytest.raises(BlobCorruptError):
        await store.get_blob("acme", digest)
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("acme", digest)
    assert await store.find_blob("acme", digest) is None
    await store.put_blob("acme", data)
    assert await store.get_blob("acme", digest) == data


async def test_lost_bytes_are_a_typed_error(store: RedisStore) -> None:
    """A blob whose bytes are gone is not found; storing it again repairs it."""
    digest = await store.put_blob("acme", bytes(200))
    await damage(store, digest, None)
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("acme", digest)
    await store.put_blob("acme", bytes(200))
    assert await store.get_blob("acme", digest) == bytes(200)


async def test_putting_again_repairs(store: RedisStore) -> None:
    """Storing content whose bytes were damaged replaces them instead of trusting their name."""
    digest = await store.put_blob("acme", bytes(200))
    await damage(store, digest, b"evil" * 50)
    await store.put_blob("acme", bytes(200))
    assert await store.get_blob("acme", digest) == bytes(200)


async def test_deleting_and_putting_at_once(store: RedisStore) -> None:
    """Whatever a collector deletes while writers put the same bytes: a put that returned has its blob."""
    data = bytes(200)
    digest = await store.put_blob("acme", data)
    done = False

    async def collect() -> None:
        while not done:
            await store.delete_blob("acme", digest)

    async def write() -> None:
        for _ in range(30):
            await store.put_blob("acme", data)
            if await store.find_blob("acme", digest) is not None:
                await store.get_blob("acme", digest)

    collector = asyncio.create_task(collect())
    missing = [
        one for one in await asyncio.gather(*(write() for _ in range(4)), return_exceptions=True) if one is not None
    ]
    done = True
    await collector
    # Between `has` and `get` a collector may come; bytes that are not the blob's may not.
    assert all(isinstance(one, BlobNotFoundError) for one in missing)
    await store.put_blob("acme", data)
    assert await store.get_blob("acme", digest) == data


async def test_what_killed_writers_leave_is_swept(url: str, tmp_path: Path) -> None:
    """Objects that no blob names go when they are old enough; named ones and young ones stay."""
    objects = FolderObjects(tmp_path / "blobs")
    store = await RedisStore.open(url, objects=objects, inline_bytes=0)
    digest = await store.put_blob("acme", b"kept")
    objects.put(f"acme/aa/{'a' * 64}.orphan", b"left behind")
    assert await store.sweep_blobs("acme", older_than_seconds=60) == []
    assert await store.sweep_blobs("acme", older_than_seconds=-1) == [f"acme/aa/{'a' * 64}.orphan"]
    assert await store.get_blob("acme", digest) == b"kept"
    assert [path.name[:64] for path in (tmp_path / "blobs" / "objects").rglob("*.*")] == [digest[7:]]
    await store.close()


async def test_a_place_that_was_not_told(url: str, tmp_path: Path) -> None:
    """A process that was started without the blobs' place is refused, or says so: nothing is lost, nothing served."""
    one = await RedisStore.open(url, objects=FolderObjects(tmp_path / "blobs"), inline_bytes=0)
    digest = await one.put_blob("acme", b"far away")
    with pytest.raises(VolatileStoreError, match="was not told where"):
        await RedisStore.open(url)
    other = await RedisStore.open(url, allow_volatile=True)
    with pytest.raises(StoreUnavailableError, match="was not told where"):
        await other.get_blob("acme", digest)
    assert await one.get_blob("acme", digest) == b"far away"
    await one.close()
    await other.close()
