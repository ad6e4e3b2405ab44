"""Erasing: nothing of it is left in the store, and nothing that was on its way comes after."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from promptd_store import (
    Add,
    Append,
    Check,
    CheckFailedError,
    LeaseLostError,
    PromptCatalog,
    PromptKind,
    PromptNotFoundError,
    Put,
    Store,
    TenantErasedError,
    UserErasedError,
    drop_unnamed,
    encode,
    number_held,
)
from promptd_store.holdings import PROMPTS, STORED_BYTES
from promptd_store.names import ERASED

from promptd.errors import NotFoundError
from promptd.jobs import JobClaims, JobQueue, JobRequest, JobSpec, TrainingFiles
from promptd.tenancy import Eraser, Erasure, KeyOffice, TenantBook, TenantDirectory, is_unbroken, read_audit, set_limits
from promptd.tenancy.audit import read_payloads
from tests.store.conftest import StoreFactory
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio
CANARY = "canary-7f3a9c"
METHOD = {"type": "residual"}
ROWS = b'{"text": "x", "label": "a"}\n'


def eraser_of(catalog: PromptCatalog, told: list[Erasure] | None = None) -> Eraser:
    """An eraser whose server has nothing in memory but the catalog's."""

    async def forget(erasure: Erasure) -> int:
        (told if told is not None else []).append(erasure)
        return catalog.forget(erasure.tenant, None if erasure.is_whole else (*erasure.versions, *erasure.spread))

    async def acknowledged(erasure: int) -> list[dict[str, Any]]:
        return [{"is_silent": False, "has_forgotten": True}]

    return Eraser(catalog, TenantDirectory(TenantBook(catalog.store)), forget, acknowledged)


def queue_of(store: Store) -> JobQueue:
    """Jobs of the base model."""
    return JobQueue(store, SPEC.fingerprint, check=lambda spec: None)


async def fill(catalog: PromptCatalog, tenant: str, user: str | None = None) -> None:
    """Give a tenant something of every kind, each with a canary of its own."""
    store, canary = catalog.store, f"{CANARY}-{tenant}"
    secret = canary.encode()
    await catalog.publish(tenant, f"tone-{canary}", soft_file(1), sidecar=secret * 3, user=user)
    text = encode(PromptKind.TEXT, None, text=f"You are {canary}").content
    await catalog.publish(tenant, "text", text, user=user, visibility="public")
    await catalog.shares.add(tenant, "text", "guest")
    rows = b'{"text": "%s", "label": "a"}\n' % secret
    file = await TrainingFiles(store).create(tenant, f"{canary}.jsonl", rows, user=user)
    queue = queue_of(store)
    digest = await queue.put_rows(tenant, rows + rows)
    specs = [JobSpec(METHOD, training_file=file.id), JobSpec(METHOD, rows_digest=digest, rows_bytes=2 * len(rows))]
    requests = [JobRequest(spec, f"{canary}-{n}", user=user) for n, spec in enumerate(specs)]
    await queue.create_many(tenant, requests)
    worker = JobClaims(store, SPEC.fingerprint, f"worker-{tenant}")
    claims = [claim for claim in await worker.claim(4) if claim.job.tenant == tenant]
    await worker.save_checkpoint(claims[0], secret * 5, 1)


async def everything(store: Store) -> list[bytes]:
    """All records, logs and blobs of all tenants, and their names."""
    found = []
    tenants = set()
    for record in await store.scan("{"):
        tenants.add(record.key[1:].partition("}")[0])
        found += [record.key.encode(), record.value]
    for event in await store.read_log("{", limit=100_000):
        found += [event.log.encode(), event.payload]
    for tenant in tenants:
        for blob in await store.scan_blobs(tenant):
            found += [await store.get_blob(tenant, blob.digest)]
    return found


def with_canary(found: list[bytes], tenant: str = "") -> int:
    """In how many of them it is, anybody's or one tenant's."""
    return sum(f"{CANARY}-{tenant}".encode() in one for one in found)


# ------------------------------------------------------------------------------- the store's own part


async def test_nothing_is_written_for_an_erased_tenant(store: Store) -> None:
    """Not by any step, and not in part; deleting still works, and so does everything of other tenants."""
    await store.transact(puts=[Put("{acme}:old", b"x")])
    await store.transact(puts=[Put(ERASED + "acme", b"{}")])
    for late in (
        {"puts": [Put("{acme}:new", b"x")]},
        {"puts": [Put("{eve}:new", b"x"), Put("{acme}:old", b"y")]},
        {"adds": [Add("{acme}:count", 1)]},
        {"appends": [Append("{acme}:events", b"x")]},
    ):
        with pytest.raises(TenantErasedError):
            await store.transact(**late)  # type: ignore[arg-type]
    with pytest.raises(TenantErasedError):
        await store.put_blob("acme", b"late")
    with pytest.raises(TenantErasedError):
        await store.publish("{acme}:events", b"x")
    assert await store.scan_blobs("acme") == []
    assert await store.get("{eve}:new") is None
    await store.transact(deletes=["{acme}:old"])
    await store.put_blob("acme.co", b"another tenant")
    await store.transact(puts=[Put("{acme.co}:new", b"x")])
    assert await store.scan("{acme}") == []


async def test_everything_of_a_tenant_goes(store: Store) -> None:
    """Records, logs, leases, blobs, also old blobs of any size; nothing of a tenant whose name begins the same."""
    for tenant in ("acme", "acme.co"):
        await store.transact(
            puts=[Put(f"{{{tenant}}}:r{n}", b"x") for n in range(1200)],
            appends=[Append(f"{{{tenant}}}:log{n}", b"x") for n in range(3)],
        )
        assert await store.acquire_lease(f"{{{tenant}}}:job:1", "w", 60) is not None
        for n in range(5):
            await store.put_blob(tenant, b"x" * n)
    assert await store.erase_tenant("acme") == {"records": 1200, "log_entries": 3, "blobs": 5, "quarantined": 0}
    assert (await store.scan("{acme}:"), await store.read_log("{acme}:"), await store.scan_blobs("acme")) == (
        [],
        [],
        [],
    )
    lease = await store.acquire_lease("{acme}:job:1", "other", 60)
    assert lease is not None and lease.owner == "other"
    assert len(await store.scan("{acme.co}:")) == 1200
    assert len(await store.scan_blobs("acme.co")) == 5
    assert await store.acquire_lease("{acme.co}:job:1", "other", 60) is None
    assert set((await store.erase_tenant("acme")).values()) == {0}


async def test_unnamed_blobs_go_at_once(store: Store) -> None:
    """Those that a record names stay, and so does one that is put again meanwhile."""
    named, unnamed = await store.put_blob("acme", b"named"), await store.put_blob("acme", b"unnamed")
    await store.transact(puts=[Put("{acme}:r", named.encode())])
    assert await drop_unnamed(store, "acme", [named, unnamed]) == 1
    assert [blob.digest for blob in await store.scan_blobs("acme")] == [named]
    assert await drop_unnamed(store, "eve", [named]) == 0


# ---------------------------------------------------------------------------------------- tenants, users


async def test_a_tenant_is_gone(catalog: PromptCatalog, store: Store) -> None:
    """Canaries of every kind are found before (the control) and nowhere after; another tenant keeps all of it."""
    book = TenantBook(store)
    directory = TenantDirectory(book)
    await KeyOffice(directory, b"secret").issue("acme", ["infer"], by="admin")
    await set_limits(directory, "acme", {"max_prompts": 9}, by="admin")
    await fill(catalog, "acme")
    await fill(catalog, "friend")
    await catalog.publish("owner", "lent", soft_file(3))
    await catalog.shares.add("owner", "lent", "acme")
    before = await everything(store)
    assert min(with_canary(before, "acme"), with_canary(before, "friend")) >= 12
    told: list[Erasure] = []
    report = await eraser_of(catalog, told).tenant("acme", by="admin")
    print(report)
    counts = {"keys": 1, "prompts": 2, "versions": 2, "shares": 1, "files": 1, "jobs": 2}
    assert {name: report[name] for name in counts} == counts
    assert report["blobs"] >= 6 and report["records"] >= 10 and report["log_entries"] >= 6
    assert told[0].is_whole and (len(told[0].versions), len(told[0].spread)) == (1, 1)  # one was public and shared
    assert await store.scan("{acme}:") == [] == await store.scan_blobs("acme")
    await store.trim_log("{public}:prompt-changes", before_seq=1 << 62)  # names, which servers read for an hour
    left = await everything(store)
    assert with_canary(left, "acme") == 0
    assert with_canary(before, "friend") - with_canary(left, "friend") == 1  # that name
    assert {record.key for record in await store.scan("{public}:") if "acme" in record.key} == {
        "{public}:erased:acme",
        "{public}:tenant:acme",
    }
    assert await catalog.shares.list("owner", "lent") == ()
    with pytest.raises(PromptNotFoundError):
        await catalog.resolve("eve", "text")  # nor its public name
    entries = await read_audit(store, "acme")
    assert [entry.action for _, entry in entries] == ["key.issued", "limits.set", "tenant.erased"]
    assert is_unbroken(await read_payloads(store, "acme"), (await book.read("acme")).audit_head)


async def test_late_writers_of_a_tenant(open_store: StoreFactory) -> None:
    """Another server's upload and file, an admin's key and limits: all refused, nothing is left."""
    here, there = [PromptCatalog(await open_store(), SPEC) for _ in range(2)]
    await fill(here, "acme")
    worker = JobClaims(there.store, SPEC.fingerprint, "late-worker")
    await here.store.transact(deletes=[one.key for one in await here.store.scan("{none}")])
    job_ids = [one.id for one in await queue_of(here.store).list("acme")]
    await eraser_of(here).tenant("acme", by="admin")
    with pytest.raises(TenantErasedError):
        await there.publish("acme", "late", soft_file(5))
    with pytest.raises(TenantErasedError):
        await TrainingFiles(there.store).create("acme", "late.jsonl", ROWS)
    with pytest.raises(TenantErasedError):
        await queue_of(there.store).put_rows("acme", ROWS)
    directory = TenantDirectory(TenantBook(there.store))
    with pytest.raises(TenantErasedError):
        await KeyOffice(directory, b"secret").issue("acme", ["infer"], by="admin")
    with pytest.raises(TenantErasedError):
        await set_limits(directory, "acme", {"weight": 2}, by="admin")
    assert await worker.claim(5) == []
    for job_id in job_ids:
        with pytest.raises(NotFoundError):
            await queue_of(there.store).get("acme", job_id)
    assert await here.store.scan("{acme}:") == []
    again = await eraser_of(there).tenant("acme", by="admin")
    assert {name: count for name, count in again.items() if count} == {"is_out_of_files": 1}


async def test_a_worker_with_an_erased_job_stops(catalog: PromptCatalog, store: Store) -> None:
    """Whatever it tries it has lost its lease; the checkpoint and the prompt that it brings leave no byte behind."""
    queue = queue_of(store)
    for whole in (False, True):
        rows = await queue.put_rows("acme", ROWS)
        spec = JobSpec(METHOD, name="learned", rows_digest=rows, rows_bytes=len(ROWS))
        await queue.create("acme", JobRequest(spec, user="u1"))
        worker = JobClaims(store, SPEC.fingerprint, f"worker-{whole}")
        (claim,) = await worker.claim(1)
        checks = await worker.publication_checks(claim)
        eraser = eraser_of(catalog)
        await (eraser.tenant("acme", by="admin") if whole else eraser.user("acme", "u1", by="key"))
        with pytest.raises(LeaseLostError):
            await worker.heartbeat(replace(claim))
        with pytest.raises((LeaseLostError, TenantErasedError)):
            await worker.save_checkpoint(claim, CANARY.encode(), 2)
        with pytest.raises(LeaseLostError):
            await worker.publication_checks(claim)
        with pytest.raises(LeaseLostError):
            await worker.release(claim)
        with pytest.raises((LeaseLostError, CheckFailedError, TenantErasedError)):
            await catalog.publish("acme", "learned", soft_file(8), sidecar=CANARY.encode(), user="u1", checks=checks)
        assert await store.scan_blobs("acme") == []
        assert await number_held(store, "acme", STORED_BYTES) == 0
        assert await queue.list("acme") == []
        assert [one.key for one in await store.scan("{public}:job-")] == []


async def test_a_user_is_gone(catalog: PromptCatalog, store: Store) -> None:
    """Prompts, files and jobs of one person, and jobs that read the person's files; the tenant's other things stay."""
    await fill(catalog, "acme", user="ann@example.org")
    await catalog.publish("acme", "other", soft_file(1), user="bob")
    await catalog.publish("acme", "own", soft_file(2))
    (file,) = await TrainingFiles(store).list("acme")
    await queue_of(store).create("acme", JobRequest(JobSpec(METHOD, training_file=file.id)))
    assert with_canary(await everything(store)) >= 12
    assert "ann@example.org" not in "".join(record.key for record in await store.scan("{acme}:user"))
    told: list[Erasure] = []
    report = await eraser_of(catalog, told).user("acme", "ann@example.org", by="acme/key")
    print(report)
    counts = {"prompts": 2, "versions": 2, "files": 1, "jobs": 3}
    assert {name: report[name] for name in counts} == counts
    assert not told[0].is_whole and (len(told[0].versions), len(told[0].spread)) == (1, 1)
    left = await everything(store)
    name = f"tone-{CANARY}".encode()  # the tenant's own word, not the person's: the name of what is gone stays
    assert with_canary([one for one in left if name not in one]) == 0
    assert b"ann@example.org" not in b"".join(left)
    assert [one.name for one in await catalog.list("acme")] == ["other", "own"]
    assert (await catalog.load(await catalog.resolve("acme", "other"))).version  # equal bytes of another user
    assert await number_held(store, "acme", PROMPTS) == 2
    assert await TrainingFiles(store).list("acme") == [] == await queue_of(store).list("acme")
    again = await eraser_of(catalog).user("acme", "ann@example.org", by="acme/key")
    assert not any(again[name] for name in counts)
    await catalog.publish("acme", "new", soft_file(4), user="ann@example.org")  # who comes back is welcome


class SlowStore:
    """A store whose blobs take their time: others come in between."""

    def __init__(self, store: Store) -> None:
        self.store, self.arrived, self.gate = store, asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    async def put_blob(self, tenant: str, data: bytes) -> str:
        """Wait, then store."""
        self.arrived.set()
        await self.gate.wait()
        return await self.store.put_blob(tenant, data)


@pytest.mark.parametrize("what", ["prompt", "file"])
async def test_what_was_on_its_way_to_a_user_comes_too_late(store: Store, what: str) -> None:
    """It began before the erasure and ends after it: refused, its bytes are gone; nobody's (the control) arrives."""
    for user in ("ann", None):
        slow = SlowStore(store)
        catalog = PromptCatalog(slow, SPEC)  # type: ignore[arg-type]
        if what == "prompt":
            late = asyncio.create_task(catalog.publish("acme", "late", soft_file(1), user=user))
        else:
            files = TrainingFiles(slow)  # type: ignore[arg-type]
            late = asyncio.create_task(files.create("acme", "late.jsonl", ROWS, user=user))  # type: ignore[arg-type]
        await slow.arrived.wait()
        await eraser_of(PromptCatalog(store, SPEC)).user("acme", "ann", by="key")
        slow.gate.set()
        if user is None:
            await late
            assert len(await store.scan_blobs("acme")) == 1
        else:
            with pytest.raises(UserErasedError):
                await late
            assert await store.scan_blobs("acme") == []


async def test_bytes_that_are_erased_and_published_at_once(store: Store) -> None:
    """Whoever has just published the same bytes keeps them: they are looked at once more behind the record."""
    catalog, eraser = PromptCatalog(store, SPEC), eraser_of(PromptCatalog(store, SPEC))
    for _ in range(5):
        await catalog.publish("acme", "gone", soft_file(1))
        await asyncio.gather(eraser.prompt("acme", "gone"), catalog.publish("acme", "stays", soft_file(1)))
        catalog.forget("acme")
        assert (await catalog.load(await catalog.resolve("acme", "stays"))).content == soft_file(1)
        await catalog.delete("acme", "stays")


async def test_a_check_is_no_write(store: Store) -> None:
    """Looking at what an erased tenant had is allowed: whoever comes too late is told by the check."""
    await store.transact(puts=[Put(ERASED + "acme", b"{}")])
    await store.transact([Check("{acme}:gone", None)], puts=[Put("{eve}:r", b"x")])
