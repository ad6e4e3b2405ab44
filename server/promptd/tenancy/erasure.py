"""Erasing a tenant, one of its users, a prompt or a file: from the store, its own files and every server's memory.

First what stops everybody: the tombstone of a tenant, which every store looks at in every step that would write for it;
the mark of a user; the records of prompts, files and jobs, without which nobody finds their bytes and no worker may
publish. Then the bytes. Every server reads one log of what it is to forget, a few times a second, and acknowledges how
far it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from promptd_store import (
    PromptCatalog,
    PromptNotFoundError,
    PromptRecord,
    Put,
    Store,
    check_tenant,
    drop_unnamed,
    scan_records,
)
from promptd_store.names import ERASED, granted_key, granted_prefix, prompt_key, public_key, versions_prefix
from promptd_store.record import PromptName
from promptd_store.users import mark_erased

from promptd.errors import NotFoundError
from promptd.jobs import JobEraser, TrainingFiles
from promptd.tenancy.book import Deed
from promptd.tenancy.calls import calls_log
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.store_keys import ERASURES_LOG, owner_key, places_key, rate_key, slots_key
from promptd.tenancy.tenant import Tenant

PAGE = 500
ACKNOWLEDGE_SECONDS = 1.0
"""How long an erasure waits for the servers that are heard of; how late ones are doing can be asked later."""
Report = dict[str, int]
"""How many of what are gone, and how many servers have not acknowledged yet."""
Acknowledged = Callable[[int], Awaitable[list[dict[str, Any]]]]
"""Returns every server that may have what an erasure names, by its place in the log, each with `is_silent` and
`has_forgotten`."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """What every server is to forget: versions of a tenant's prompts, or everything of the tenant."""

    tenant: str
    versions: tuple[str, ...] = ()
    """Only this tenant has them: another's prompts of the same content are its own, and stay."""
    spread: tuple[str, ...] = ()
    """Others may have them too: they were public, or shared."""
    is_whole: bool = False

    def to_bytes(self) -> bytes:
        """Write an entry of the log."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Erasure:
        """Read what `to_bytes` wrote."""
        plain = json.loads(data)
        return cls(plain["tenant"], tuple(plain["versions"]), tuple(plain["spread"]), plain["is_whole"])


class Eraser:
    """Every call may be repeated: what another call has left half done is done then.

    `forget` drops what this server has in memory and returns how many prompts were resident.
    """

    def __init__(
        self,
        catalog: PromptCatalog,
        directory: TenantDirectory,
        forget: Callable[[Erasure], Awaitable[int]],
        acknowledged: Acknowledged,
    ) -> None:
        self._catalog = catalog
        self._store: Store = catalog.store
        self._directory = directory
        self._forget = forget
        self._acknowledged = acknowledged
        self._files = TrainingFiles(catalog.store)
        self._jobs = JobEraser(catalog.store, directory.book.clock)

    async def tenant(self, name: str, *, by: str) -> Report:
        """Erase a tenant; its name is never used again. Its audit log stays: it holds no content."""
        report = Counter(keys=0, prompts=0, versions=0, shares=0, files=0, jobs=0)
        now = self._directory.book.clock()

        def step(before: Tenant) -> tuple[Tenant, Deed] | None:
            report["keys"] = len(before.active_keys(now))
            if before.erased_at is not None:
                return None
            tombstone = Put(ERASED + name, json.dumps({"at": now}).encode())
            deed = Deed("tenant.erased", {}, [tombstone], [owner_key(key.id) for key in before.keys])
            return Tenant(name, audit_head=before.audit_head, erased_at=now), deed

        await self._directory.change(check_tenant(name), by, step)
        versions = await self._versions(name)
        report["versions"] = len(versions)
        told = await self._tell(await self._erasure(name, versions, is_whole=True), report)
        await self._store.transact(puts=[Put(ERASED + name, json.dumps({"at": now, "told": told}).encode())])
        await self._take_back(name, report)
        report["files"] = len(await self._files.list(name))
        report["jobs"] = await self._jobs.forget_tenant(name)
        report.update(await self._store.erase_tenant(name))
        await self._store.trim_log(calls_log(name), before_seq=1 << 62)  # it names prompts
        shared = [rate_key(name, "requests"), rate_key(name, "tokens"), slots_key(name), places_key(name)]
        await self._store.transact(deletes=shared)
        return await self._finish(report, told)

    async def servers(self, name: str) -> list[dict[str, Any]] | None:
        """Return which servers have forgotten an erased tenant; None where they were not told, or it is not erased."""
        tombstone = await self._store.get(ERASED + name)
        told = None if tombstone is None else json.loads(tombstone.value).get("told")
        return None if told is None else await self._acknowledged(told)

    async def user(self, tenant: str, user: str, *, by: str) -> Report:
        """Erase one end user's prompts, files and jobs. A name that has any version of the user goes whole."""
        await mark_erased(self._store, tenant, user)
        report = Counter(prompts=0, versions=0, files=0, jobs=0)
        files = [one for one in await self._files.list(tenant) if one.user == user]
        jobs = await self._jobs.forget_user(tenant, user, {file.id for file in files})
        report["jobs"] = len(jobs)
        versions = await self._versions(tenant)  # read behind the jobs: none of them publishes any more
        names = {one.name for one in versions if one.user == user}
        told = await self._tell(await self._erasure(tenant, [one for one in versions if one.name in names]), report)
        gone: list[PromptRecord] = []
        for name in sorted(names):
            with suppress(PromptNotFoundError):
                gone += await self._catalog.delete(tenant, name)
                report["prompts"] += 1
        for file in files:
            with suppress(NotFoundError):
                await self._files.delete(tenant, file.id)
                report["files"] += 1
        digests = {digest for one in gone for digest in one.digests} | {file.digest for file in files}
        digests |= {digest for job in jobs for digest in job.digests}
        report["versions"], report["blobs"] = len(gone), await drop_unnamed(self._store, tenant, digests)
        who = hashlib.sha256(user.encode()).hexdigest()[:16]
        await self._directory.change(
            tenant, by, lambda before: (before, Deed("user.erased", {"user_sha256": who, **report}))
        )
        return await self._finish(report, told)

    async def prompt(self, tenant: str, name: str, *, if_match: str | None = None) -> Report:
        """Delete a prompt, its bytes now and not when they are old; raises `PromptNotFoundError`."""
        was_shared = await self._catalog.shares.were_made(tenant, name)
        gone = await self._catalog.delete(tenant, name, if_match=if_match)
        digests = {digest for one in gone for digest in one.digests}
        report = Counter(versions=len(gone), blobs=await drop_unnamed(self._store, tenant, digests))
        told = await self._tell(_sorted(tenant, [(one, was_shared) for one in gone]), report)
        return await self._finish(report, told)

    async def file(self, tenant: str, file_id: str) -> Report:
        """Delete a file, its bytes now; raises `NotFoundError`."""
        record = await self._files.get(tenant, file_id)
        await self._files.delete(tenant, file_id)
        return await self._finish(Counter(blobs=await drop_unnamed(self._store, tenant, [record.digest])))

    async def _tell(self, erasure: Erasure, report: Counter[str]) -> int:
        """Have every server forget it, this one at once; return its place in the log."""
        told = 0
        for at in range(0, max(1, len(erasure.versions), len(erasure.spread)), PAGE):
            some = slice(at, at + PAGE)
            part = replace(erasure, versions=erasure.versions[some], spread=erasure.spread[some])
            told = await self._store.publish(ERASURES_LOG, part.to_bytes())
            report["resident_prompts"] += await self._forget(part)
        return told

    async def _finish(self, report: Counter[str], told: int | None = None) -> Report:
        """Take what was deleted out of the store's own files, and wait a little for what all servers say."""
        is_out_of_files = int(await self._store.erase())
        until = time.monotonic() + ACKNOWLEDGE_SECONDS
        late = await self._late(told)
        while not all(one["is_silent"] for one in late) and time.monotonic() < until:
            await asyncio.sleep(0.05)
            late = await self._late(told)
        return {**report, "pending_servers": len(late), "is_out_of_files": is_out_of_files}

    async def _late(self, told: int | None) -> list[dict[str, Any]]:
        return [] if told is None else [one for one in await self._acknowledged(told) if not one["has_forgotten"]]

    async def _erasure(self, tenant: str, records: Collection[PromptRecord], *, is_whole: bool = False) -> Erasure:
        shared = {name: await self._catalog.shares.were_made(tenant, name) for name in {one.name for one in records}}
        return replace(_sorted(tenant, [(one, shared[one.name]) for one in records]), is_whole=is_whole)

    async def _take_back(self, tenant: str, report: Counter[str]) -> None:
        """End what others have of a tenant: public names, shares in both directions."""
        prefix = prompt_key(tenant, "")
        async for stored in scan_records(self._store, prefix):
            name, state = stored.key.removeprefix(prefix), PromptName.from_bytes(stored.value)
            report["prompts"] += bool(state.current)
            entries = [granted_key(grantee, tenant, name) for grantee in state.shared_with]
            report["shares"] += len(entries)
            public = await self._store.get(public_key(name))
            if public is not None and public.value.decode() == tenant:
                entries.append(public.key)
            if entries:
                await self._store.transact(deletes=entries)
        received = granted_prefix(tenant)
        for stored in await self._store.scan(received):
            name, owner = stored.key.removeprefix(received).split(":")
            with suppress(PromptNotFoundError):
                await self._catalog.shares.remove(owner, name, tenant)

    async def _versions(self, tenant: str) -> list[PromptRecord]:
        return [PromptRecord.from_bytes(one.value) for one in await self._store.scan(versions_prefix(tenant))]


def _sorted(tenant: str, records: Collection[tuple[PromptRecord, bool]]) -> Erasure:
    """Put versions that others may have, because they were public or shared, apart from those that they cannot."""
    spread = {one.version for one, was_shared in records if was_shared or one.visibility == "public"}
    return Erasure(tenant, tuple(sorted({one.version for one, _ in records} - spread)), tuple(sorted(spread)))
