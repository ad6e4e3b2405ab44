"""What is not kept for ever: old versions, prompts that nobody uses, bytes that were set aside."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest
from promptd_store import (
    PromptCatalog,
    PromptNotFoundError,
    Put,
    Store,
    find_faults,
    prune_unused,
    prune_versions,
)
from promptd_store.blobs import QUARANTINE_SECONDS, BlobFolder
from promptd_store.objects import BucketObjects, FolderObjects, Objects

from promptd.retention import Pruned, Retention
from promptd.tenancy import Counts, UsageLedger, note_beginning, used_prompts
from promptd.tenancy.uses import DAY_SECONDS
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio

NOW = 1_800_000_000.0


class Days:
    """A clock that is set by the day."""

    def __init__(self) -> None:
        self.ago = 0.0

    def __call__(self) -> float:
        """Return seconds since 1970."""
        return NOW - self.ago * DAY_SECONDS


async def test_old_versions_go(store: Store) -> None:
    """The newest ones stay, and what a name points to, and what others stand behind; numbers do not come back."""
    catalog = PromptCatalog(store, SPEC)
    records = [await catalog.publish("acme", "tone", soft_file(number)) for number in range(6)]
    await catalog.publish("eve", "public", soft_file(50), visibility="public")
    await catalog.publish("acme", "behind", soft_file(60), behind=[f"tone@{records[2].version}"])
    await catalog.rollback("acme", "tone", 1)
    assert await prune_versions(store, "acme", keep=2) == ["tone@2", "tone@4"]
    assert [record.number for record in await catalog.versions("acme", "tone")] == [6, 5, 3, 1]
    assert (await catalog.resolve("acme", "tone")).number == 1
    with pytest.raises(PromptNotFoundError):
        await catalog.resolve("acme", f"tone@{records[1].version}")
    assert (await catalog.publish("acme", "tone", soft_file(70))).number == 7
    assert await prune_versions(store, "acme", keep=5) == []
    assert [fault async for fault in find_faults(store)] == []


async def test_what_nobody_uses_goes_whole(store: Store) -> None:
    """Names go that are old, unused and needed by no other; a name that moves amid it stays, and so do numbers."""
    days = Days()
    catalog = PromptCatalog(store, SPEC, clock=days)
    other = PromptCatalog(store, SPEC)  # another server, which remembers what names meant
    days.ago = 40
    for number, name in enumerate(("used", "unused", "renewed", "team", "deleted")):
        await catalog.publish("acme", name, soft_file(number))
    await catalog.publish("acme", "unused", soft_file(10))
    await catalog.publish("acme", "shared", soft_file(11), visibility="public")
    await catalog.delete("acme", "deleted")
    days.ago = 1
    await catalog.publish("acme", "renewed", soft_file(12))
    await catalog.publish("eve", "mine", soft_file(13), visibility="private")
    await catalog.publish("acme", "user", soft_file(14), behind=["team"])
    await other._remembered.poll(store)
    await other.resolve("acme", "unused")
    not_since = NOW - 31 * DAY_SECONDS
    assert await prune_unused(store, "acme", used={"used"}, not_since=not_since) == ["shared", "unused"]
    for catalogue in (catalog, other):
        for viewer, ref in (("acme", "unused"), ("acme", "unused@1"), ("eve", "acme/shared"), ("eve", "shared")):
            with pytest.raises(PromptNotFoundError):
                await catalogue.resolve(viewer, ref)
    await other._remembered.poll(store)
    assert other._remembered.recall("acme", "unused") is None
    assert [record.name for record in await catalog.list("acme")] == ["renewed", "team", "used", "user"]
    assert (await catalog.publish("acme", "unused", soft_file(1))).number == 3
    assert [fault async for fault in find_faults(store)] == []


async def test_uses_come_from_the_ledger(store: Store) -> None:
    """Whoever asked, alone or as part of a chain, and on which day: nothing is known unused before it could be."""
    days = Days()
    ledger = UsageLedger(store, "server", clock=days)
    ledger.add("acme", "key", "tone", Counts(requests=1))
    await ledger.flush()
    assert await used_prompts(store, 10, NOW) is None  # nobody has noted the beginning: nothing is known
    days.ago = 9
    await note_beginning(store, days())
    await note_beginning(store, NOW)  # the first one counts
    assert await used_prompts(store, 10, NOW) is None
    for ago, tenant, prompt, counts in (
        (9, "acme", "old", Counts(requests=1)),
        (8, "acme", "tone", Counts(requests=1)),
        (8, "acme", "in-front", Counts()),
        (0, "eve", "acme/lent", Counts(requests=1)),
        (0, "eve", "tone-2", Counts(requests=1)),
        (0, "eve", "", Counts(requests=1)),
    ):
        days.ago = ago
        ledger.add(tenant, "key", prompt, counts)
    await ledger.flush()
    assert await used_prompts(store, 9, NOW) == {"acme": {"old", "tone", "in-front", "lent"}, "eve": {"tone-2", ""}}
    assert await used_prompts(store, 8, NOW) == {"acme": {"tone", "in-front", "lent"}, "eve": {"tone-2", ""}}
    shown = [key.prompt for key, _ in await ledger.read("acme", "2000-01-01", "2100-01-01")]
    assert sorted(shown) == ["old", "tone", "tone"]  # a report of use has no line for what took nothing


async def test_one_round(store: Store) -> None:
    """Both rules together; the control: without a rule nothing goes, and without knowledge of uses no name."""
    days = Days()
    catalog = PromptCatalog(store, SPEC, clock=days)
    days.ago = 40
    for name in ("used", "unused"):
        for number in range(3):
            await catalog.publish("acme", name, soft_file(number))

    async def round_of(keep_versions: int | None, unused_days: int | None) -> Pruned:
        retention = Retention(store, keep_versions=keep_versions, unused_days=unused_days, clock=lambda: NOW)
        knows = await retention.look()
        assert knows or unused_days is not None
        return await retention.apply("acme")

    assert await round_of(None, None) == Pruned([], [])
    assert await round_of(None, 30) == Pruned([], [])  # uses were never noted
    await note_beginning(store, days())
    days.ago = 5
    ledger = UsageLedger(store, "server", clock=days)
    ledger.add("acme", "key", "used", Counts(requests=1))
    await ledger.flush()
    assert await round_of(None, 60) == Pruned([], [])  # not noted for so long
    assert await round_of(2, 30) == Pruned(["unused"], ["used@1"])
    assert await round_of(2, 30) == Pruned([], [])
    assert [record.number for record in await catalog.versions("acme", "used")] == [3, 2]


@pytest.mark.parametrize("kind", ["blobs", "objects", "bucket"])
async def test_the_quarantine_is_emptied(kind: str, tmp_path: Path) -> None:
    """What was set aside a month ago goes; younger bytes, another tenant's and what is not ours stay."""
    hexes = "0" * 64
    mid = f"{hexes}" if kind == "blobs" else f"00.{hexes}.{'1' * 16}"
    long_ago = time.time_ns() - round((QUARANTINE_SECONDS + 60) * 1e9)
    lately = time.time_ns() - round((QUARANTINE_SECONDS - 60) * 1e9)
    names = [f"acme.{mid}.{long_ago}", f"acme.{mid}.{lately}", f"acme.eu.{mid}.{long_ago}", "acme.notes"]
    if kind == "bucket":
        url = f"memory://{uuid.uuid4().hex}"
        objects: Objects = BucketObjects(url)
        for name in names:
            objects._files.pipe_file(f"{objects._root}/quarantine/{name}", b"x")  # type: ignore[attr-defined]
        for expected in (names[:1], []):
            assert objects.clear_aside("acme", min_age_seconds=QUARANTINE_SECONDS) == expected
        assert BucketObjects(f"memory://{uuid.uuid4().hex}").clear_aside("acme") == []
        return
    folder = BlobFolder(tmp_path) if kind == "blobs" else FolderObjects(tmp_path)
    for name in names:
        (tmp_path / "quarantine" / name).write_bytes(b"x")
    if isinstance(folder, BlobFolder):
        gone = folder.sweep("acme", 0)
    else:
        gone = folder.clear_aside("acme", min_age_seconds=QUARANTINE_SECONDS)
    assert gone == names[:1]
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == sorted(names[1:])


@pytest.mark.parametrize("open_store", ["embedded", "redis with a folder"], indirect=True)
async def test_what_was_set_aside_goes_with_a_sweep(store: Store, tmp_path: Path) -> None:
    """Through the store itself: a blob whose bytes went bad is set aside, and a month later it is no more.

    What Redis keeps itself it also lets go by itself.
    """
    (folder,) = (one for one in (tmp_path / "store", tmp_path / "blobs") if one.exists())
    name = f"acme.{'0' * 64}.1" if folder.name == "store" else f"acme.00.{'0' * 64}.{'1' * 16}.1"
    (folder / "quarantine" / name).write_bytes(b"x")
    await store.transact(puts=[Put("{acme}:a", b"1")])
    assert await store.sweep_blobs("acme", older_than_seconds=0) == [name]
    assert not list((folder / "quarantine").iterdir())
