"""Blobs of a Redis store: small ones in Redis, large ones outside under a name that is never used twice.

Redis knows of every blob where it lies, so whether there is a blob, how old it is and which bytes it means change in
one atomic step; the bytes outside are written before, and deleted after, what names them.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from promptd_store.base import BlobInfo, Content
from promptd_store.blobs import QUARANTINE_SECONDS, digest_hex
from promptd_store.errors import BlobCorruptError, BlobNotFoundError, StoreUnavailableError, TenantErasedError
from promptd_store.names import check_tenant
from promptd_store.objects import Objects
from promptd_store.redis_backend import blob_scripts as scripts
from promptd_store.redis_backend.link import RedisLink
from promptd_store.redis_backend.scripts import Script

INLINE_BYTES = 1 << 20
"""Blobs up to this size lie in Redis, where there is another place for larger ones."""
OUTSIDE_SECONDS = 60.0
"""How long a place outside may take for one object: a bucket, or a folder of another machine, may never answer."""
OUTSIDE_THREADS = 8
"""Calls that wait for that place at a time: they have threads of their own, so that nothing else waits with them."""
MICROSECONDS = 1_000_000
MARK = "mark"
"""Name of the object that says whose place it is."""
MARK_SECONDS = 10.0
"""How long the first process of a store may take to leave its mark."""
POLL_SECONDS = 0.05
PAGE = 1000

_T = TypeVar("_T")


class RedisBlobs:
    """`objects` None: all blobs lie in Redis."""

    def __init__(self, link: RedisLink, prefix: str, objects: Objects | None, inline_bytes: int = INLINE_BYTES) -> None:
        self._link = link
        self._prefix = prefix
        self._objects = objects
        self._inline_bytes = inline_bytes
        self._threads = ThreadPoolExecutor(OUTSIDE_THREADS, thread_name_prefix="promptd-blobs")

    async def faults(self) -> list[str]:
        """Say what is wrong with the place outside: it and the store have the same mark, left there by the first start.

        So no process looks for blobs where they are not, and none sweeps away those of another store.
        """
        if self._objects is None:
            is_needed = await self._link.command("EXISTS", self._prefix + "place")
            return ["large files lie outside Redis, and this process was not told where (blobs)"] if is_needed else []
        own = secrets.token_hex(16)
        until = time.monotonic() + MARK_SECONDS
        while True:
            stored = await self._link.script(scripts.PLACE, self._prefix + "place", own)
            *pending, wanted = stored.decode().split()
            found = await self._read(MARK)
            if found is None and pending and (wanted == own or time.monotonic() > until):  # or the first one has died
                await self._outside(partial(_leave_mark, mark=wanted))
                found = wanted.encode()
            if found is not None or not pending:
                break
            await asyncio.sleep(POLL_SECONDS)
        if found is None:
            key = self._prefix + "place"
            what = "large files lie elsewhere: give all servers and workers the same place (blobs)"
            return [f"{what}; where it was never used, or is gone for good, delete Redis' key {key!r}"]
        if found.decode() != wanted:
            return [
                f"the blobs' place is another store's: take an empty one, or delete its {MARK!r} if that one is gone"
            ]
        if pending:
            await self._link.script(scripts.SETTLE, self._prefix + "place", wanted)
        return []

    async def put(self, tenant: str, data: Content) -> str:
        """Store bytes durably and return their digest; an equal blob that is already there is only renewed."""
        digest = await _sha256(data)
        if self._objects is None or len(data) <= self._inline_bytes:
            old = await self._step(scripts.PUT_BLOB, tenant, digest, data)
            if old is None:
                raise TenantErasedError(tenant)
        else:
            if await self._renewed(tenant, digest):
                return "sha256:" + digest
            place = f"{tenant}/{digest[:2]}/{digest}.{secrets.token_hex(8)}"
            await self._outside(lambda objects: objects.put(place, data))
            old = await self._step(scripts.PLACE_BLOB, tenant, digest, len(data), place)
            if old is None:
                await self._remove(place)
                raise TenantErasedError(tenant)
            if old.decode() == place:  # the step was repeated
                old = b""
        await self._remove(old.decode())
        return "sha256:" + digest

    async def get(self, tenant: str, digest: str) -> bytes:
        """Read and check one blob."""
        hex_digest = digest_hex(digest)
        found = await self._step(scripts.GET_BLOB, tenant, hex_digest)
        if found is None:
            raise BlobNotFoundError(f"no blob {digest}", param=digest)
        place, data = found[0].decode(), found[1]
        if place:
            data = await self._read(place)
        if data is None:
            raise BlobNotFoundError(f"the bytes of blob {digest} are gone", param=digest)
        if await _sha256(data) != hex_digest:
            sha1 = hashlib.sha1(data).hexdigest()  # noqa: S324 - what Redis can compute itself
            if await self._step(scripts.QUARANTINE_BLOB, tenant, hex_digest, place, sha1) and place:
                await self._outside(lambda objects: objects.set_aside(place))
            raise BlobCorruptError(f"blob {digest} does not have its digest any more; set aside", param=digest)
        return bytes(data)

    async def find(self, tenant: str, digest: str) -> BlobInfo | None:
        """Return size and age of a blob."""
        entry = await self._link.command("HGET", self._index(tenant), digest_hex(digest))
        return None if entry is None else _info(digest_hex(digest), entry)

    async def delete(self, tenant: str, digest: str, unused_for_seconds: float, last_put: float | None) -> bool:
        """Delete a blob that was not put for this long, or since then."""
        age = round(unused_for_seconds * MICROSECONDS)
        at = "" if last_put is None else round(last_put * MICROSECONDS)
        place = await self._step(scripts.DELETE_BLOB, tenant, digest_hex(digest), age, at)
        if place is None:
            return False
        await self._remove(place.decode())
        return True

    async def scan(self, tenant: str) -> list[BlobInfo]:
        """List a tenant's blobs."""
        found: dict[str, BlobInfo] = {}
        for digest, entry in await self._entries(tenant):
            found[digest] = _info(digest, entry)
        return [found[digest] for digest in sorted(found)]

    async def sweep(self, tenant: str, *, older_than_seconds: float) -> list[str]:
        """Delete objects outside that nothing names, of killed writers and deleters, or that were long set aside.

        What was set aside in Redis goes by itself.
        """
        if self._objects is None:
            return []
        old = await self._outside(
            lambda objects: [name for name, age in objects.scan(check_tenant(tenant)) if age > older_than_seconds]
        )
        named = {_place(entry) for _, entry in await self._entries(tenant)}  # read last: a writer names after it writes
        gone = [name for name in old if name not in named]
        for name in gone:
            await self._remove(name)
        return gone + await self._outside(
            lambda objects: objects.clear_aside(tenant, min_age_seconds=QUARANTINE_SECONDS)
        )

    async def clear_quarantine(self, tenant: str, digest: str | None) -> int:
        """Delete what was set aside, here and outside."""
        wanted = "*" if digest is None else digest_hex(digest)
        num = await self._link.delete_matching(f"{self._prefix}quarantine:{check_tenant(tenant)}:", f"{wanted}:*")
        if self._objects is not None:
            aside = None if digest is None else wanted
            num += len(await self._outside(lambda objects: objects.clear_aside(tenant, aside)))
        return num

    async def erase(self, tenant: str) -> int:
        """Delete all of a tenant's blobs, and what no blob's name leads to; return how many blobs."""
        found = await self.scan(tenant)
        for blob in found:
            await self.delete(tenant, blob.digest, 0, None)
        await self.sweep(tenant, older_than_seconds=-1)
        return len(found)

    def close(self) -> None:
        """Let go of the threads; a call that still waits ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _renewed(self, tenant: str, digest: str) -> bool:
        """Make a blob that is whole younger; False where there is none."""
        found = await self._step(scripts.GET_BLOB, tenant, digest)
        if found is None or not found[0]:
            return False
        place = found[0].decode()
        if await _sha256(await self._read(place) or b"") != digest:
            return False
        return bool(await self._step(scripts.RENEW_BLOB, tenant, digest, place))

    async def _entries(self, tenant: str) -> list[tuple[str, bytes]]:
        entries, cursor = [], "0"
        while True:
            cursor, pairs = await self._link.hash_page(self._index(tenant), cursor, PAGE)
            entries += [(digest.decode(), entry) for digest, entry in pairs]
            if cursor == "0":
                return entries

    async def _read(self, place: str) -> bytes | None:
        def read(objects: Objects) -> bytes | None:
            try:
                return objects.get(place)
            except FileNotFoundError:
                return None

        return await self._outside(read)

    async def _remove(self, place: str) -> None:
        if place:
            await self._outside(lambda objects: objects.delete(place))

    async def _outside(self, work: Callable[[Objects], _T]) -> _T:
        if self._objects is None:
            raise StoreUnavailableError("this blob lies outside Redis, and this process was not told where (blobs)")
        objects = self._objects
        try:
            async with asyncio.timeout(OUTSIDE_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, objects)
        except StoreUnavailableError:
            raise
        except Exception as error:  # each kind of bucket has errors of its own
            what = getattr(error, "strerror", None) or type(error).__name__
            raise StoreUnavailableError(f"the blobs' place failed: {what}") from error

    async def _step(self, script: Script, tenant: str, *args: str | Content | int) -> Any:
        return await self._link.script(script, self._index(tenant), self._prefix, tenant, *args)

    def _index(self, tenant: str) -> str:
        return f"{self._prefix}blobs:{check_tenant(tenant)}"


def _leave_mark(objects: Objects, mark: str) -> None:
    objects.put(MARK, mark.encode())


def _info(digest: str, entry: bytes) -> BlobInfo:
    at, size, _ = entry.split(b" ", 2)
    return BlobInfo("sha256:" + digest, int(size), int(at) / MICROSECONDS)


def _place(entry: bytes) -> str:
    return entry.split(b" ", 2)[2].decode()


async def _sha256(data: Content) -> str:
    """Hash, beside the event loop where that takes more than a moment."""
    if len(data) <= 1 << 17:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
