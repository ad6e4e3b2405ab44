"""The store protocol: records, blobs, leases and events. Every backend passes the same contract tests.

Keys and logs start with their tenant in braces, `{acme}:prompt:tone`; blobs belong to a tenant and are
named by their digest. A call that returned is durable: it survives kill -9 at any instant.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Content = bytes | memoryview
"""A file's bytes, in memory or where a file is mapped."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored value. The etag changes with every write and never comes back, not even after a deletion."""

    key: str
    value: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Check:
    """Require that a record has this etag; None requires that it does not exist."""

    key: str
    etag: str | None


@dataclass(frozen=True, slots=True)
class Lease:
    """A right that expires. `epoch` grows with every acquisition and is the fencing token."""

    key: str
    owner: str
    epoch: int
    expires_at: float
    """Seconds since 1970 on the store's clock."""


@dataclass(frozen=True, slots=True)
class HasBlob:
    """Require that a tenant's blob is there, and renew it: whoever deletes what is old then leaves it."""

    tenant: str
    digest: str


Condition = Check | Lease | HasBlob


@dataclass(frozen=True, slots=True)
class Put:
    """Write a record."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """Add to a count: a record that holds a whole number in digits, absent where it is 0. Once a transaction and key.

    Where the amount is positive and the sum is above the number in the record `limit_key`, nothing at all is done.
    """

    key: str
    amount: int
    limit_key: str | None = None


@dataclass(frozen=True, slots=True)
class Append:
    """Add an entry to a log; subscribers of the log get it as an event."""

    log: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One log entry. `seq` grows over all logs of the store."""

    seq: int
    log: str
    payload: bytes
    at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One stored blob; every put of the same bytes, and every HasBlob, moves `last_put` (seconds since 1970)."""

    digest: str
    num_bytes: int
    last_put: float


class Subscription(Protocol):
    """Events as they are committed, in order, none twice; an async iterator that ends after `aclose`."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """Return itself."""
        ...

    async def __anext__(self) -> Event:
        """Wait for the next event."""
        ...

    async def aclose(self) -> None:
        """End the iteration."""
        ...


@runtime_checkable
class Store(Protocol):
    """What every backend can do."""

    @property
    def is_up(self) -> bool:
        """Whether the last thing heard of what keeps the data was good; what it refused does not count."""
        ...

    async def put_blob(self, tenant: str, data: Content) -> str:
        """Store bytes and return `sha256:…`; the same bytes are stored once a tenant. TenantErasedError."""
        ...

    async def get_blob(self, tenant: str, digest: str) -> bytes:
        """Return the bytes, checked against the digest; BlobNotFoundError or BlobCorruptError."""
        ...

    async def find_blob(self, tenant: str, digest: str) -> BlobInfo | None:
        """Return what is known of a blob; its bytes are not looked at."""
        ...

    async def delete_blob(
        self, tenant: str, digest: str, *, unused_for_seconds: float = 0.0, last_put: float | None = None
    ) -> bool:
        """Delete a blob whose last put is at least this long ago, or exactly this one; return whether it was."""
        ...

    async def scan_blobs(self, tenant: str) -> list[BlobInfo]:
        """Return a tenant's blobs, ordered by digest."""
        ...

    async def sweep_blobs(self, tenant: str, *, older_than_seconds: float) -> list[str]:
        """Delete what killed writers have left, if it is this old, and corpses of the quarantine; return the names.

        No blob is touched.
        """
        ...

    async def clear_quarantine(self, tenant: str, digest: str | None = None) -> int:
        """Delete what was set aside as corrupt, of one blob or of all of a tenant's; return how many."""
        ...

    async def erase_tenant(self, tenant: str) -> Mapping[str, int]:
        """Delete everything of a tenant; return how many `records`, `log_entries`, `blobs` and `quarantined`.

        Its tombstone (`names.ERASED`) is written before, so that nothing comes after.
        """
        ...

    async def get(self, key: str) -> Record | None:
        """Return one record."""
        ...

    async def get_many(self, keys: Sequence[str]) -> list[Record | None]:
        """Return records in the order of their keys; None for each that is not there."""
        ...

    async def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, containing: str = ""
    ) -> list[Record]:
        """Return the records whose key starts with `prefix` and is greater than `after`, ordered by key.

        With `containing` only those that have these characters behind the prefix, ASCII letters in either case.
        """
        ...

    async def transact(
        self,
        checks: Sequence[Condition] = (),
        puts: Sequence[Put] = (),
        deletes: Sequence[str] = (),
        appends: Sequence[Append] = (),
        adds: Sequence[Add] = (),
    ) -> dict[str, str]:
        """Do all or nothing; return the etag of every key put.

        What is to be written for a tenant that was erased raises TenantErasedError, whoever writes, however late.
        A failed Check raises CheckFailedError; a Lease in `checks` whose epoch is not the present one raises
        LeaseLostError, so that an owner who woke too late cannot write; a HasBlob of one that is gone
        BlobNotFoundError; an Add over its limit LimitReachedError.
        """
        ...

    async def acquire_lease(self, key: str, owner: str, ttl_seconds: float) -> Lease | None:
        """Take a free or expired lease under a new epoch; None while another holds it."""
        ...

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """Extend a lease, also one that has expired and that nobody took; LeaseLostError otherwise."""
        ...

    async def release_lease(self, lease: Lease) -> None:
        """Give a lease back; nothing happens where it was lost already."""
        ...

    async def publish(self, log: str, payload: bytes) -> int:
        """Append one event and return its seq."""
        ...

    async def subscribe(self, prefix: str, *, after: int | None = None) -> Subscription:
        """Follow all logs whose name starts with `prefix`, from now on or from after an earlier seq."""
        ...

    async def read_log(self, prefix: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return past events of all logs whose name starts with `prefix`, oldest first."""
        ...

    async def read_tail(self, log: str, *, before: int | None = None, limit: int = 1000) -> list[Event]:
        """Return the last events of one log, or the last ones before a seq; newest first."""
        ...

    async def trim_log(self, log: str, *, before_seq: int) -> int:
        """Delete a log's entries with a smaller seq; return how many."""
        ...

    async def erase(self) -> bool:
        """Take what was deleted out of this store's own files; return False where it is not allowed to, or not yet."""
        ...

    async def close(self) -> None:
        """Release everything; calls that are under way finish first."""
        ...
