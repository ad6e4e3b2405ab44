"""A store as a whole: copied while it is written to, checked, kept small; and records of two releases side by side."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from promptd_store import (
    EmbeddedStore,
    PromptCatalog,
    PromptRecord,
    Put,
    RecordTooNewError,
    Store,
    StoreNotEmptyError,
    copy_store,
    find_faults,
)
from promptd_store.objects import FolderObjects
from promptd_store.record import PromptName
from promptd_store.redis_backend.store import RedisStore
from promptd_store.transfer import Transferred
from typer.testing import CliRunner

from promptd.cli import app
from promptd.commands.doctor import check_store
from tests.redis_server import RedisServer
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["embedded to Redis", "Redis to embedded", "Redis to Redis"])
async def pair(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path: Path
) -> AsyncIterator[tuple[Store, Store]]:
    """A source and an empty target."""

    async def opened(kind: str) -> Store:
        if kind.lower() == "embedded":
            return EmbeddedStore(tmp_path / uuid.uuid4().hex)
        return await RedisStore.open(f"{redis_server.url}?prefix={uuid.uuid4().hex}:")

    source, target = [await opened(kind) for kind in request.param.split(" to ")]
    yield source, target
    await source.close()
    await target.close()


async def dump(store: Store) -> dict[str, object]:
    """Everything that a store holds, without what only it knows: etags, seqs and the mark of a copy."""
    records = {record.key: record.value for record in await store.scan("{") if "copied-events" not in record.key}
    tenants = sorted({key[1 : key.index("}")] for key in records})
    blobs = {(tenant, blob.digest) for tenant in tenants for blob in await store.scan_blobs(tenant)}
    return {"records": records, "blobs": blobs, "events": [(e.log, e.payload) for e in await store.read_log("{")]}


async def filled(store: Store, count: int = 6) -> PromptCatalog:
    """A catalog with prompts of two tenants, versions, a deletion and a public one."""
    catalog = PromptCatalog(store, SPEC)
    for number in range(count):
        await catalog.publish("acme", f"tone-{number % 3}", soft_file(number), sidecar=b"sidecar %d" % number)
    await catalog.publish("eve", "shared", soft_file(99), visibility="public")
    await catalog.publish("eve", "gone", soft_file(98))
    await catalog.delete("eve", "gone")
    return catalog


async def test_a_copy_is_the_same(pair: tuple[Store, Store]) -> None:
    """Records, needed blobs and events arrive; prompts are served from the copy; a second run has nothing to do."""
    source, target = pair
    await filled(source)
    first: list[Transferred] = []
    await copy_store(source, target, on_pass=first.append)
    assert first[0].num_blobs >= 13 and first[-1].is_still and len(first) == 2
    theirs, ours = await dump(source), await dump(target)
    assert (ours["records"], ours["events"]) == (theirs["records"], theirs["events"])
    copied = PromptCatalog(target, SPEC)
    record = await copied.resolve("acme", "eve/shared")
    assert (await copied.load(record)).version == record.version
    assert [fault async for fault in find_faults(target)] == []
    again = await copy_store(source, target)
    assert again.is_still


async def test_a_live_source_is_caught_up_with(pair: tuple[Store, Store]) -> None:
    """Versions, moves and deletions that happen while the copy runs are in it after the last run."""
    source, target = pair
    catalog = await filled(source)
    done = False

    async def write() -> None:
        for number in range(40):
            await catalog.publish("acme", f"live-{number % 5}", soft_file(1000 + number))
            if number % 4 == 3:
                await catalog.delete("acme", f"live-{number % 5}")
            await asyncio.sleep(0.001)

    writer = asyncio.create_task(write())
    while not done:
        done = writer.done()
        await copy_store(source, target)
    await writer
    assert (await copy_store(source, target)).is_still
    assert (await dump(target))["records"] == (await dump(source))["records"]
    assert (await dump(target))["events"] == (await dump(source))["events"]
    assert [fault async for fault in find_faults(target)] == []


async def test_another_store_is_not_overwritten(pair: tuple[Store, Store]) -> None:
    """A target with records of its own is refused, whole."""
    source, target = pair
    await filled(source)
    await target.transact(puts=[Put("{acme}:prompt:mine", b"1")])
    before = await dump(target)
    with pytest.raises(StoreNotEmptyError):
        await copy_store(source, target)
    assert await dump(target) == before


async def test_what_is_lost_or_damaged_is_found(store: Store) -> None:
    """A lost blob, a pointer to nothing and an unreadable record are a line each; the control is the whole store."""
    catalog = await filled(store)
    assert [fault async for fault in find_faults(store)] == []
    lost = await catalog.resolve("acme", "tone-0")
    await store.delete_blob("acme", lost.content_digest)
    dangling = await catalog.resolve("acme", "tone-1")
    await store.transact(deletes=[f"{{acme}}:version:tone-1:{dangling.number:09d}"])
    await store.transact(puts=[Put("{acme}:prompt:broken", b"{")])
    faults = [fault async for fault in find_faults(store)]
    assert len(faults) == 3
    for text in (lost.content_digest, f"points to version {dangling.number}", "'broken' cannot be read"):
        assert sum(text in fault for fault in faults) == 1, faults


async def test_a_newer_release_beside_this_one(store: Store) -> None:
    """Fields that this release does not know are left alone; a schema that it would misread is a typed error."""
    catalog = PromptCatalog(store, SPEC)
    await catalog.publish("acme", "tone", soft_file(1))
    for key in ("{acme}:prompt:tone", "{acme}:version:tone:000000001"):
        stored = await store.get(key)
        assert stored is not None
        plain = json.loads(stored.value)
        assert plain["schema_version"] == 1
        await store.transact(puts=[Put(key, json.dumps({**plain, "colour": "red"}).encode())])
        assert (await catalog.resolve("acme", "tone")).number == 1
        await store.transact(puts=[Put(key, json.dumps({**plain, "schema_version": 2}).encode())])
        with pytest.raises(RecordTooNewError, match="schema version 2"):
            await catalog.resolve("acme", "tone")
        del plain["schema_version"]  # as the first releases wrote it
        await store.transact(puts=[Put(key, json.dumps(plain).encode())])
        assert (await catalog.resolve("acme", "tone")).number == 1
    for kind in (PromptRecord, PromptName):
        with pytest.raises(RecordTooNewError):
            kind.from_bytes(b'{"schema_version": 99}')


def run(*words: str, code: int = 0) -> str:
    """Run `promptd store`; return what it prints."""
    done = CliRunner().invoke(app, ["store", *words])
    assert done.exit_code == code, done.output
    return done.output


def test_the_commands(redis_server: RedisServer, tmp_path: Path) -> None:
    """Backup, restore, copy, verify and gc from the terminal, over a folder and over Redis."""
    folder, backup, url = tmp_path / "store", tmp_path / "backup", f"{redis_server.url}?prefix={uuid.uuid4().hex}:"

    async def fill() -> None:
        store = EmbeddedStore(folder)
        await filled(store)
        await store.close()

    asyncio.run(fill())

    run("copy", str(folder), url)
    run("verify", "--store", url)
    run("backup", str(backup), "--store", url)
    run("restore", str(backup), "--store", str(tmp_path / "restored"))
    run("verify", "--store", str(tmp_path / "restored"))
    assert "records of its own" in run("restore", str(backup), "--store", str(folder), code=1)
    assert "is no backup" in run("restore", str(tmp_path / "nothing"), code=1)
    cleaned = run("gc", "--store", str(folder), "--keep-versions", "1", "--min-age-hours", "0")
    assert "deleted 0 prompts, 3 versions" in cleaned and "acme  0 prompts, 3 versions" in cleaned
    assert "have not been noted" in run("gc", "--store", str(folder), "--unused-days", "30")
    run("verify", "--store", str(folder))
    next((folder / "blobs").glob("acme/*/*")).write_bytes(b"damaged")
    assert "set aside" in run("verify", "--store", str(folder), code=1)


def test_the_commands_find_large_files(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the servers were told, too. The control: without that each of them is a fault."""
    url, place = f"{redis_server.url}?prefix={uuid.uuid4().hex}:", tmp_path / "place"

    async def fill() -> None:
        store = await RedisStore.open(url, objects=FolderObjects(place), inline_bytes=0)
        await filled(store)
        await store.close()

    asyncio.run(fill())
    monkeypatch.setenv("PROMPTD_STORE", url)
    assert "was not told where" in run("verify", code=1)
    monkeypatch.setenv("PROMPTD_BLOBS", str(place))
    run("verify")
    assert check_store(url, str(place)).answer.endswith(f"large files in {place}")
    run("backup", str(tmp_path / "backup"))
    monkeypatch.delenv("PROMPTD_BLOBS")
    run("verify", "--store", str(tmp_path / "backup"))
    monkeypatch.setenv("PROMPTD_STORE", f"{redis_server.url}?prefix={uuid.uuid4().hex}:")
    monkeypatch.setenv("PROMPTD_BLOBS", str(tmp_path / "another"))
    run("restore", str(tmp_path / "backup"))
    run("verify")
    (tmp_path / "file").write_text("x")
    for store, blobs in ((url, tmp_path / "file"), (str(tmp_path / "backup"), place)):
        assert check_store(store, str(blobs)).verdict == "FAIL"
