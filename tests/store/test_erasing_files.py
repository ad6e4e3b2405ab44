"""Nothing of what was erased is left in the files of Redis or of a folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from promptd_store import (
    Append,
    EmbeddedStore,
    PromptCatalog,
    Put,
)
from promptd_store.names import ERASED
from promptd_store.objects import FolderObjects
from promptd_store.redis_backend.store import RedisStore

from tests.redis_server import RedisServer, running_redis
from tests.store.files import SPEC
from tests.store.test_erasing import CANARY, eraser_of, fill

pytestmark = pytest.mark.anyio


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, Path]]:
    """A Redis whose files nobody else writes to, that makes dumps too, and the folder of its large blobs."""
    with running_redis(tmp_path / "redis", save="3600 1") as server:
        yield server, tmp_path


def on_disk(folder: Path) -> int:
    """How many files hold the canary, by content or name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(CANARY.encode() in path.read_bytes() or CANARY in path.name for path in files)


async def test_nothing_is_left_on_the_disk_of_redis(own_redis: tuple[RedisServer, Path]) -> None:
    """Append-only file, dump, blobs outside, what was set aside: the canary is in all of them before, in none after."""
    server, folder = own_redis
    async with AsyncExitStack() as stack:
        objects = FolderObjects(folder / "blobs")
        store = await RedisStore.open(f"{server.url}?prefix=t:", objects=objects, inline_bytes=30)
        stack.push_async_callback(store.close)
        large, small = (CANARY.encode() * 9, CANARY.encode())
        for data in (large, small):
            digest = await store.put_blob("acme", data)
            for path in (folder / "blobs" / "objects").glob("acme/*/*"):
                path.write_bytes(b"corrupt " + CANARY.encode())
            if data is small:
                key = f"t:blob:acme:{digest.removeprefix('sha256:')}"
                await store._link.command("SET", key, b"corrupt " + CANARY.encode())
            with pytest.raises(Exception, match="digest"):
                await store.get_blob("acme", digest)
        await store.put_blob("acme", large)
        await store.transact(puts=[Put("{acme}:r", CANARY.encode())], appends=[Append("{acme}:l", CANARY.encode())])
        await store._link.command("SAVE")
        assert on_disk(folder / "redis") >= 2
        assert on_disk(folder / "blobs") == 2
        await store.transact(puts=[Put(ERASED + "acme", b"{}")])
        assert (await store.erase_tenant("acme"))["quarantined"] == 2
        assert on_disk(folder / "redis") >= 2  # the control: Redis' own files still have it
        assert await store.erase()
        assert on_disk(folder) == 0
        before = await store._link.command("INFO", "persistence")
        assert await store.erase()  # nothing was deleted since: no file is written
        assert _rewrites(await store._link.command("INFO", "persistence")) == _rewrites(before)


def _rewrites(info: object) -> object:
    return info["aof_rewrites"] if isinstance(info, dict) else None


async def test_redis_may_not_let_us(tmp_path: Path) -> None:
    """A user without the right is no failure: the answer says that the files still have it."""
    with running_redis(tmp_path / "redis") as server:
        store = await RedisStore.open(server.url)
        try:
            await store._link.command(
                "ACL", "SETUSER", "promptd", "on", ">pw", "~promptd:*", "resetchannels", "-@all", "+@read", "+@write",
                "+@connection", "+eval", "+evalsha", "+time", "+info", "+config|get", "+wait", "-keys",
            )  # fmt: skip
            limited = await RedisStore.open(f"redis://promptd:pw@127.0.0.1:{server.port}")
            try:
                await limited.transact(puts=[Put("{acme}:r", b"x")])
                assert await limited.erase_tenant("acme") == {
                    "records": 1, "log_entries": 0, "blobs": 0, "quarantined": 0,
                }  # fmt: skip
                assert not await limited.erase()
            finally:
                await limited.close()
            assert await store.erase()
        finally:
            await store.close()


async def test_nothing_is_left_on_the_disk_of_a_folder(tmp_path: Path) -> None:
    """SQLite file, its log, blobs, half-written blobs, what was set aside."""
    store = EmbeddedStore(tmp_path / "store")
    try:
        catalog = PromptCatalog(store, SPEC)
        await fill(catalog, "acme")
        broken = await store.put_blob("acme", b"to be broken")
        path = next((tmp_path / "store" / "blobs").glob(f"acme/*/{broken.removeprefix('sha256:')}"))
        path.write_bytes(b"corrupt " + CANARY.encode())
        with pytest.raises(Exception, match="digest"):
            await store.get_blob("acme", broken)
        (path.parent / ".tmp-killed").write_bytes(CANARY.encode())
        assert on_disk(tmp_path) >= 7  # the control
        report = await eraser_of(catalog).tenant("acme", by="admin")
        assert (report["quarantined"], report["is_out_of_files"]) == (1, 1)
        left = await store.read_log("{public}:prompt-changes")
        assert any(CANARY.encode() in event.payload for event in left)  # names, for an hour: servers read them
        await store.trim_log("{public}:prompt-changes", before_seq=1 << 62)
        assert await store.erase()
        assert on_disk(tmp_path) == 0
    finally:
        await store.close()
