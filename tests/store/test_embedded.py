"""The embedded store's own promises: files, rights, corruption, full disks, other processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import pytest
from promptd_store import (
    Append,
    BlobCorruptError,
    BlobNotFoundError,
    EmbeddedStore,
    HasBlob,
    Put,
    Store,
    StoreUnavailableError,
)

from tests.patience import PATIENCE_SECONDS
from tests.store.forge import Forge

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An embedded store."""
    opened = EmbeddedStore(tmp_path / "store", poll_seconds=0.01)
    yield opened
    await opened.close()


def blob_files(root: Path) -> list[Path]:
    """All files under the blob folder."""
    return [path for path in (root / "store" / "blobs").rglob("*") if path.is_file()]


async def test_files_are_private(store: Store, tmp_path: Path) -> None:
    """Nobody but the owner can read the store: 0600 for files, 0700 for folders."""
    await store.put_blob("acme", b"x")
    await store.transact(puts=[Put("{acme}:k", b"v")])
    paths = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    assert len(paths) > 6
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("damage", [b"", b"tamper", b"x" * 100])
async def test_corrupt_blob_is_never_served(store: Store, tmp_path: Path, damage: bytes) -> None:
    """Changed bytes are a typed error, the file is set aside, and the same content can be stored again."""
    digest = await store.put_blob("acme", b"x" * 99)
    (path,) = blob_files(tmp_path)
    path.write_bytes(damage)
    with pytest.raises(BlobCorruptError):
        await store.get_blob("acme", digest)
    (aside,) = (tmp_path / "store" / "quarantine").iterdir()
    assert aside.read_bytes() == damage
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("acme", digest)
    await store.put_blob("acme", b"x" * 99)
    assert await store.get_blob("acme", digest) == b"x" * 99


async def test_putting_again_repairs(store: Store, tmp_path: Path) -> None:
    """Storing content whose file was damaged replaces the file instead of trusting its name."""
    digest = await store.put_blob("acme", b"good")
    (path,) = blob_files(tmp_path)
    path.write_bytes(b"evil")
    assert await store.put_blob("acme", b"good") == digest
    assert await store.get_blob("acme", digest) == b"good"


async def test_sync_comes_before_the_name(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob's bytes reach the disk before its name exists, and the name before the caller is answered."""
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        happened.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        fsync(descriptor)

    def recording_rename(source: Path, target: Path, **options: object) -> None:
        happened.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    await store.put_blob("acme", b"x" * 10)
    assert happened == ["sync folder", "sync folder", "sync 10 bytes", "rename", "sync folder"]
    happened.clear()
    await store.put_blob("acme", b"x" * 10)
    assert happened == ["sync folder"]


async def test_failed_sync_is_not_acknowledged(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk refuses to sync, the put fails with a typed error and leaves nothing behind."""

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.put_blob("acme", b"x")
    assert caught.value.retryable and caught.value.status == 503
    assert blob_files(tmp_path) == []
    await store.put_blob("acme", b"x")


async def test_what_is_put_again_holds_nobody_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a file that is there already is read, which takes long where it is large, others write."""
    await store.put_blob("acme", b"large")
    is_read, go_on, digest_of = threading.Event(), threading.Event(), hashlib.file_digest

    def slow(stream: BinaryIO, name: str) -> object:
        is_read.set()
        go_on.wait(PATIENCE_SECONDS)
        return digest_of(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    again = asyncio.create_task(store.put_blob("acme", b"large"))
    try:
        assert await asyncio.to_thread(is_read.wait, PATIENCE_SECONDS)
        async with asyncio.timeout(PATIENCE_SECONDS / 2):
            small = await store.put_blob("acme", b"small")
            await store.transact([HasBlob("acme", small)], [Put("{acme}:k", b"v")])
    finally:
        go_on.set()
    assert await store.get_blob("acme", await again) == b"large"


async def test_leftovers_of_killed_writers_are_removed(store: Store, tmp_path: Path) -> None:
    """Old temporary files go when the store is opened; young ones may belong to a living writer and stay."""
    await store.put_blob("acme", b"x")
    (blob,) = blob_files(tmp_path)
    old, young = blob.parent / ".tmp-old", blob.parent / ".tmp-young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    assert len(await store.scan_blobs("acme")) == 1
    await EmbeddedStore(tmp_path / "store").close()
    assert set(blob_files(tmp_path)) == {blob, young}


async def test_unusable_folder_is_a_typed_error(tmp_path: Path) -> None:
    """A path that is a file, or a database that is none, cannot be opened and says so."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreUnavailableError):
        EmbeddedStore(tmp_path / "file")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "records.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreUnavailableError):
        EmbeddedStore(tmp_path / "store")


async def test_full_disk_is_a_typed_error(tmp_path: Path) -> None:
    """Where the records do not fit any more, the whole transaction is refused and the store goes on."""
    store = EmbeddedStore(tmp_path / "store")
    await store.transact(puts=[Put("{acme}:old", b"kept")])
    store._records._connection.execute("PRAGMA max_page_count = 40")
    with pytest.raises(StoreUnavailableError):
        await store.transact(puts=[Put(f"{{acme}}:{i}", bytes(10_000)) for i in range(40)], deletes=["{acme}:old"])
    assert [record.key for record in await store.scan("{acme}:")] == ["{acme}:old"]
    await store.transact(puts=[Put("{acme}:new", b"fits")])
    await store.close()


async def test_newer_schema_is_refused(store: Store, tmp_path: Path) -> None:
    """A store written by a newer release is not touched by an older one."""
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "records.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreUnavailableError, match="99"):
        EmbeddedStore(tmp_path / "store")


async def test_commits_reach_the_disk(tmp_path: Path) -> None:
    """Records are committed with WAL and a sync at every commit: a killed machine loses nothing acknowledged."""
    store = EmbeddedStore(tmp_path / "store")
    connection = store._records._connection
    settings = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]
    await store.close()


async def test_deleted_values_are_in_no_file(tmp_path: Path) -> None:
    """Records and log entries that were deleted are overwritten; the control: before, both files have them."""
    store = EmbeddedStore(tmp_path / "store")
    for number in range(200):
        await store.transact(
            puts=[Put(f"{{acme}}:{number}", b"secret" * 50)], appends=[Append("{acme}:log", b"secret" * 50)]
        )

    def files() -> set[str]:
        return {
            path.name for path in (tmp_path / "store").iterdir() if path.is_file() and b"secret" in path.read_bytes()
        }

    await store.erase()
    await store.transact(puts=[Put("{acme}:more", b"secret")])
    assert files() == {"records.sqlite", "records.sqlite-wal"}
    await store.transact(deletes=[record.key for record in await store.scan("{acme}:")])
    await store.trim_log("{acme}:log", before_seq=1 << 62)
    await store.erase()
    assert files() == set()
    await store.close()


async def test_other_process_is_seen(store: Store, forge: Forge, tmp_path: Path) -> None:
    """Records, blobs and events of another process on the same folder arrive here, while this one writes too."""
    subscription = await store.subscribe("{acme}:")
    forge.order(do="tell", folder=str(tmp_path / "store"), count=50)
    for i in range(50):
        await store.transact(puts=[Put(f"{{acme}}:own:{i}", b"x")])
        await asyncio.sleep(0.001)
    async with asyncio.timeout(30):
        seen = [(await anext(subscription)).payload for _ in range(50)]
        started, told = [await asyncio.to_thread(forge.hear) for _ in range(2)]
    assert seen == [b"%d" % i for i in range(50)]
    assert await store.get_blob("acme", told["digest"]) == b"from the other process"
    assert len(await store.scan("{acme}:")) == 100
    forge.order(do="wait", pid=started["pid"])
    assert (await asyncio.to_thread(forge.hear))["ended"] == started["pid"]


async def test_many_open_at_once(tmp_path: Path) -> None:
    """Opening a new folder from several threads at the same time works for all."""
    stores = await asyncio.gather(*(asyncio.to_thread(EmbeddedStore, tmp_path / "store") for _ in range(8)))
    for i, store in enumerate(stores):
        await store.transact(puts=[Put(f"{{acme}}:{i}", b"x")])
    assert len(await stores[0].scan("{acme}:")) == 8
    for store in stores:
        await store.close()
