"""The `Store` protocol over one Redis, shared by any number of servers and workers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

from promptd_store.base import (
    Add,
    Append,
    BlobInfo,
    Condition,
    Content,
    Event,
    Lease,
    Put,
    Record,
    Subscription,
)
from promptd_store.errors import LeaseLostError, StoreError, StoreUnavailableError, VolatileStoreError
from promptd_store.names import check_tenant
from promptd_store.objects import Objects
from promptd_store.redis_backend import scripts
from promptd_store.redis_backend.blobs import INLINE_BYTES, MICROSECONDS, RedisBlobs
from promptd_store.redis_backend.durability import faults
from promptd_store.redis_backend.events import Feed, RedisSubscription
from promptd_store.redis_backend.link import RedisLink
from promptd_store.redis_backend.rewriting import rewrite
from promptd_store.redis_backend.target import RedisTarget, parse_target
from promptd_store.redis_backend.transaction import outcome_of, words_of

SCHEMA_VERSION = 1
CONNECT_SECONDS = 10.0
"""How long a start waits for a Redis that is starting too."""
PAGE = 500
_LAST_BYTE = b"\xff"


class RedisStore:
    """One process's access to the store; belongs to the event loop that it was opened in. Open it with `open`."""

    def __init__(self, target: RedisTarget, objects: Objects | None, inline_bytes: int) -> None:
        self.target = target
        self._prefix = target.prefix
        self._tick = target.prefix + "tick"
        self._link = RedisLink(target)
        self._blobs = RedisBlobs(self._link, target.prefix, objects, inline_bytes)
        self._feed = Feed(self._link, target.prefix + "feed", self._newest)
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        address: str,
        *,
        objects: Objects | None = None,
        inline_bytes: int = INLINE_BYTES,
        allow_volatile: bool = False,
        on_fault: Callable[[str], None] = lambda fault: None,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> RedisStore:
        """Connect and check what Redis promises.

        Blobs of more than `inline_bytes` go to `objects`, where given. Raises `VolatileStoreError` for a Redis that
        would lose data, or for a place that is another store's, unless that is allowed: then each fault is only told.
        Raises `StoreUnavailableError` where no Redis answers in time, or one whose data a newer release has written.
        """
        store = cls(parse_target(address), objects, inline_bytes)
        try:
            await store._link.connect(connect_seconds)
            found = await faults(store._link, store.target.num_replicas)
            if not found or allow_volatile:  # else nothing is written to it
                found += await store._blobs.faults()
            if found and not allow_volatile:
                raise VolatileStoreError(store.target.shown, found)
            for fault in found:
                on_fault(fault)
            await store._check_schema()
        except BaseException:
            await store.close()
            raise
        return store

    @property
    def is_up(self) -> bool:
        """Whether Redis answers, as far as is known."""
        return self._link.is_up

    async def put_blob(self, tenant: str, data: Content) -> str:
        """Store bytes and return their digest."""
        return await self._blobs.put(tenant, data)

    async def get_blob(self, tenant: str, digest: str) -> bytes:
        """Return checked bytes."""
        return await self._blobs.get(tenant, digest)

    async def find_blob(self, tenant: str, digest: str) -> BlobInfo | None:
        """Return what is known of a blob."""
        return await self._blobs.find(tenant, digest)

    async def delete_blob(
        self, tenant: str, digest: str, *, unused_for_seconds: float = 0.0, last_put: float | None = None
    ) -> bool:
        """Delete a blob that was not put for this long, or since then."""
        return await self._blobs.delete(tenant, digest, unused_for_seconds, last_put)

    async def scan_blobs(self, tenant: str) -> list[BlobInfo]:
        """List a tenant's blobs."""
        return await self._blobs.scan(tenant)

    async def sweep_blobs(self, tenant: str, *, older_than_seconds: float) -> list[str]:
        """Delete what killed writers left outside Redis; return the names."""
        return await self._blobs.sweep(tenant, older_than_seconds=older_than_seconds)

    async def get(self, key: str) -> Record | None:
        """Return one record."""
        stored = await self._link.command("GET", f"{self._prefix}record:{key}")
        return None if stored is None else _record(key, stored)

    async def get_many(self, keys: Sequence[str]) -> list[Record | None]:
        """Return many records; each page of some hundreds is read at one instant."""
        records: list[Record | None] = []
        for at in range(0, len(keys), PAGE):
            page = keys[at : at + PAGE]
            found = await self._link.command("MGET", *(f"{self._prefix}record:{key}" for key in page))
            pairs = zip(page, found, strict=True)
            records += [None if stored is None else _record(key, stored) for key, stored in pairs]
        return records

    async def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, containing: str = ""
    ) -> list[Record]:
        """Return records by prefix, ordered by key; each page of some hundreds is read at one instant."""
        records: list[Record] = []
        lowest, highest = _range(prefix)
        if after.encode() >= prefix.encode():
            lowest = b"(" + after.encode()
        wanted = (containing.lower(), len(prefix.encode()))
        while limit is None or len(records) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(records))
            last, *found = await self._link.script(
                scripts.SCAN, self._tick, self._prefix, lowest, highest, size, *wanted
            )
            records += [_record(key.decode(), stored) for key, stored in zip(found[::2], found[1::2], strict=True)]
            if not last:
                break
            lowest = b"(" + last
        return records

    async def transact(
        self,
        checks: Sequence[Condition] = (),
        puts: Sequence[Put] = (),
        deletes: Sequence[str] = (),
        appends: Sequence[Append] = (),
        adds: Sequence[Add] = (),
    ) -> dict[str, str]:
        """Do all or nothing."""
        etag, _ = await self._transact(checks, puts, deletes, appends, adds)
        return {put.key: etag for put in puts}

    async def acquire_lease(self, key: str, owner: str, ttl_seconds: float) -> Lease | None:
        """Take a lease that nobody holds; time is Redis' own."""
        ttl, nonce = round(ttl_seconds * MICROSECONDS), secrets.token_hex(8)
        found = await self._link.script(scripts.ACQUIRE, self._tick, self._prefix, key, owner, ttl, nonce)
        return None if found is None else Lease(key, owner, int(found[0]), int(found[1]) / MICROSECONDS)

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """Extend a lease."""
        ttl = round(ttl_seconds * MICROSECONDS)
        expires = await self._link.script(
            scripts.RENEW, self._tick, self._prefix, lease.key, lease.owner, lease.epoch, ttl
        )
        if expires is None:
            raise LeaseLostError.of(lease.key, lease.owner, lease.epoch)
        return Lease(lease.key, lease.owner, lease.epoch, int(expires) / MICROSECONDS)

    async def release_lease(self, lease: Lease) -> None:
        """Give a lease back."""
        await self._link.script(scripts.RELEASE, self._tick, self._prefix, lease.key, lease.epoch)

    async def publish(self, log: str, payload: bytes) -> int:
        """Append one event."""
        _, seqs = await self._transact((), (), (), [Append(log, payload)], ())
        return seqs[0]

    async def subscribe(self, prefix: str, *, after: int | None = None) -> Subscription:
        """Follow logs by prefix."""
        subscription = RedisSubscription(
            prefix, await self._newest() if after is None else after, self._feed, self._read_log
        )
        self._feed.add(subscription)
        return subscription

    async def read_log(self, prefix: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return past events."""
        events, _ = await self._read_log(prefix, after, limit)
        return events

    async def read_tail(self, log: str, *, before: int | None = None, limit: int = 1000) -> list[Event]:
        """Return the last events of one log, newest first."""
        last = "+" if before is None else f"{max(0, before - 1)}-0"
        found = await self._link.script(scripts.READ_TAIL, self._tick, self._prefix, log, last, limit)
        return [_event(seq, log, payload) for seq, payload in zip(found[::2], found[1::2], strict=True)]

    async def trim_log(self, log: str, *, before_seq: int) -> int:
        """Delete old entries of one log."""
        first = f"{max(0, before_seq)}-0"
        return int(await self._link.script(scripts.TRIM, self._tick, self._prefix, log, first))

    async def clear_quarantine(self, tenant: str, digest: str | None = None) -> int:
        """Delete what was set aside."""
        return await self._blobs.clear_quarantine(tenant, digest)

    async def erase_tenant(self, tenant: str) -> Mapping[str, int]:
        """Delete everything of a tenant."""
        lowest, highest = _range(f"{{{check_tenant(tenant)}}}:")
        num_records = 0
        while num := int(
            await self._link.script(scripts.ERASE_RECORDS, self._tick, self._prefix, lowest, highest, PAGE)
        ):
            num_records += num
        num_entries = await self._link.script(scripts.ERASE_LOGS, self._tick, self._prefix, lowest, highest)
        await self._link.delete_matching(f"{self._prefix}lease:{{{tenant}}}:", "*")
        return {
            "records": num_records,
            "log_entries": int(num_entries),
            "blobs": await self._blobs.erase(tenant),
            "quarantined": await self.clear_quarantine(tenant),
        }

    async def erase(self) -> bool:
        """Have Redis rewrite its files, which still have what was deleted; nothing happens where nothing was."""
        return await rewrite(self._link, self._prefix + "deleted")

    async def close(self) -> None:
        """End all subscriptions, let the calls under way finish, disconnect."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._feed.close()
        await self._link.close()
        self._blobs.close()

    async def _transact(
        self,
        checks: Sequence[Condition],
        puts: Sequence[Put],
        deletes: Sequence[str],
        appends: Sequence[Append],
        adds: Sequence[Add],
    ) -> tuple[str, list[int]]:
        words = words_of(checks, puts, deletes, appends, adds)
        return outcome_of(await self._link.script(scripts.TRANSACT, self._tick, self._prefix, *words))

    async def _read_log(self, prefix: str, after: int, limit: int) -> tuple[list[Event], int]:
        """Return events in order and the seq up to which nothing was left out."""
        lowest, highest = _range(prefix)
        newest, *found = await self._link.script(
            scripts.READ_LOG, self._tick, self._prefix, lowest, highest, f"{max(0, after) + 1}-0", limit
        )
        events = [
            _event(seq, log.decode(), payload)
            for seq, log, payload in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]
        events = sorted(events, key=lambda event: event.seq)[:limit]
        return events, events[-1].seq if len(events) == limit else max(int(newest), after)

    async def _newest(self) -> int:
        return int(await self._link.command("GET", self._tick) or 0)

    async def _check_schema(self) -> None:
        key = self._prefix + "schema"
        await self._link.command("SET", key, SCHEMA_VERSION, "NX")
        version = int(await self._link.command("GET", key))
        if version > SCHEMA_VERSION:
            raise StoreUnavailableError(
                f"the store at {self.target.shown} has schema version {version}, written by a newer release; "
                f"this one knows {SCHEMA_VERSION}"
            )


def _range(prefix: str) -> tuple[bytes, bytes]:
    return b"[" + prefix.encode(), b"[" + prefix.encode() + _LAST_BYTE


def _record(key: str, stored: bytes) -> Record:
    etag, separator, value = stored.partition(b"\n")
    if not separator:
        raise StoreError(f"record {key!r} is not one of this store", param=key)
    return Record(key, value, etag.decode())


def _event(seq: bytes, log: str, payload: bytes) -> Event:
    return Event(int(seq), log, payload, int(seq) / MICROSECONDS)
