"""Where large blobs lie beside Redis: durable through a power cut, refused where of no use, away when it is away."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from promptd_store import StoreAddressError, StoreUnavailableError, VolatileStoreError, objects, synced
from promptd_store.objects import BucketObjects, FolderObjects, open_objects
from promptd_store.redis_backend import blobs
from promptd_store.redis_backend.store import RedisStore

from tests.patience import PATIENCE_SECONDS
from tests.power import OwnSyncs
from tests.redis_server import RedisServer


def name_of(number: int) -> tuple[str, bytes]:
    """A name in one of some folders, and the bytes behind it."""
    data = b"%d" % number * 1000
    digest = hashlib.sha256(data).hexdigest()
    tenant = "eve" if number % 4 == 1 else "acme"
    return f"{tenant}/{number % 4:02x}/{digest}.{secrets.token_hex(8)}", data


def lost_at_power_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Write from two processes' places, cut the power, and count the objects that are gone or not whole.

    One tenant's folder is there and not synced: another process is about to do that.
    """
    folder.mkdir()
    syncs = OwnSyncs(monkeypatch)
    places = [FolderObjects(folder / "blobs") for _ in range(2)]
    (folder / "blobs" / "objects" / "eve" / "01").mkdir(parents=True)
    wanted = dict(map(name_of, range(40)))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda at: places[at[0] % 2].put(*at[1]), enumerate(wanted.items())))
    syncs.cut(folder)
    after = FolderObjects(folder / "blobs")

    def is_whole(name: str, data: bytes) -> bool:
        try:
            return after.get(name) == data
        except FileNotFoundError:
            return False

    return sum(not is_whole(name, data) for name, data in wanted.items())


def test_a_power_cut_takes_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All objects are there. The controls: where folders are not synced all are gone, and where bytes are not, too."""
    assert lost_at_power_cut(tmp_path / "synced", monkeypatch) == 0
    controls: list[tuple[Any, str, Callable[..., Any]]] = [
        (objects, "sync_folder", lambda folder: None),
        (synced, "sync_folder", lambda folder: None),
        (synced, "write_synced", Path.write_bytes),
    ]
    for number, control in enumerate(controls):
        with monkeypatch.context() as careless:
            careless.setattr(*control)
            assert lost_at_power_cut(tmp_path / str(number), careless) == 40


def test_a_place_of_no_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first large file but at the start, with the place and the reason; a good one is left empty."""
    good = tmp_path / "good"
    open_objects(str(good))
    assert not [path for path in good.rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreUnavailableError, match="file"):
        open_objects(str(tmp_path / "file"))
    with pytest.raises(StoreAddressError, match="nowhere"):
        open_objects("nowhere://bucket/folder")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(StoreUnavailableError, match=r"good.*No space left"):
            open_objects(str(good))

    def forbidden(*args: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(BucketObjects, "put", forbidden)
    with pytest.raises(StoreUnavailableError, match=r"memory://bucket/folder.*Access Denied"):
        open_objects("memory://bucket/folder")


class Hanging(FolderObjects):
    """A folder of a machine that does not answer while it is told not to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.answers = threading.Event()
        self.answers.set()

    def get(self, name: str) -> bytes:
        """Wait, then read."""
        self.answers.wait()
        return super().get(name)


@pytest.mark.anyio
async def test_a_place_that_does_not_answer(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever needs it is told in time that it is away, however many do, and no other work waits for a thread with
    them; once it answers all is well again."""
    place = Hanging(tmp_path / "blobs")
    url = f"{redis_server.url}?prefix=hanging:"
    store = await RedisStore.open(url, objects=place, inline_bytes=0)
    try:
        digest = await store.put_blob("acme", b"far away")
        monkeypatch.setattr(blobs, "OUTSIDE_SECONDS", 0.2)
        place.answers.clear()
        calls = asyncio.gather(*(store.get_blob("acme", digest) for _ in range(40)), return_exceptions=True)
        async with asyncio.timeout(PATIENCE_SECONDS):
            answers = await calls
            assert await asyncio.to_thread(lambda: 1) == 1
        assert {type(answer) for answer in answers} == {StoreUnavailableError}
        assert "the blobs' place failed: TimeoutError" in str(answers[0])
        monkeypatch.undo()
        place.answers.set()
        assert await store.get_blob("acme", digest) == b"far away"
    finally:
        place.answers.set()
        await store.close()


@pytest.mark.anyio
async def test_a_place_is_one_stores(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that were told different places, and stores that were told the same one, are refused with the reason:
    the first would not find each other's blobs, the second would sweep them away."""
    monkeypatch.setattr(blobs, "MARK_SECONDS", 0.2)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    async def opens(store: str, place: Path) -> str:
        try:
            opened = await RedisStore.open(f"{redis_server.url}?prefix=place-{store}:", objects=FolderObjects(place))
        except VolatileStoreError as error:
            (fault,) = error.faults
            return fault
        await opened.close()
        return ""

    assert await asyncio.gather(*(opens("one", ours) for _ in range(4))) == [""] * 4
    assert (await opens("one", theirs)).startswith("large files lie elsewhere")
    assert (await opens("two", ours)).startswith("the blobs' place is another store's")
    assert await opens("two", theirs) == ""  # it had begun elsewhere, and nothing is there yet
    assert (await opens("one", theirs)).startswith("the blobs' place is another store's")
    assert await opens("one", ours) == await opens("two", theirs) == ""
    told: list[str] = []
    url = f"{redis_server.url}?prefix=place-one:"
    await (await RedisStore.open(url, objects=FolderObjects(theirs), allow_volatile=True, on_fault=told.append)).close()
    assert len(told) == 1
