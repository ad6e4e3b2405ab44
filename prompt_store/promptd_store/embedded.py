"""The store of one machine: a folder with a SQLite file and content-addressed blobs. Nothing else to run."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from promptd_store.base import (
    Add,
    Append,
    BlobInfo,
    Condition,
    Content,
    Event,
    HasBlob,
    Lease,
    Put,
    Record,
    Subscription,
)
from promptd_store.blobs import BlobFolder
from promptd_store.errors import StoreUnavailableError, TenantErasedError
from promptd_store.names import ERASED, check_tenant
from promptd_store.record_file import RecordFile
from promptd_store.synced import sync_folder

POLL_SECONDS = 0.1
"""How late an event of another process may be seen; this process's own are seen at once."""
BLOB_THREADS = 4

_T = TypeVar("_T")


class EmbeddedStore:
    """The `Store` protocol over one folder, which several processes may use at a time."""

    def __init__(
        self, path: str | Path, *, poll_seconds: float = POLL_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        root = Path(path)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _opening(root):
                self._records = RecordFile(root / "records.sqlite", clock)
                self._blobs = BlobFolder(root)
        except (OSError, sqlite3.Error) as error:
            raise StoreUnavailableError(f"cannot open the store in {root}: {error}") from error
        self._poll_seconds = poll_seconds
        self._record_thread = ThreadPoolExecutor(1, thread_name_prefix="promptd-records")
        self._blob_threads = ThreadPoolExecutor(BLOB_THREADS, thread_name_prefix="promptd-blobs")
        self._subscriptions: set[_LogSubscription] = set()
        self._closed = False
        self._is_up = True

    @property
    def is_up(self) -> bool:
        """Whether the files could be read or written the last time."""
        return self._is_up

    async def put_blob(self, tenant: str, data: Content) -> str:
        """Store bytes and return their digest."""
        digest = await self._run(self._blob_threads, lambda: self._blobs.put(tenant, data))
        if await self.get(ERASED + tenant) is not None:  # looked at last: what erases comes after its tombstone
            await self.delete_blob(tenant, digest)
            raise TenantErasedError(tenant)
        return digest

    async def get_blob(self, tenant: str, digest: str) -> bytes:
        """Return checked bytes."""
        return await self._run(self._blob_threads, lambda: self._blobs.get(tenant, digest))

    async def find_blob(self, tenant: str, digest: str) -> BlobInfo | None:
        """Return what is known of a blob."""
        return await self._run(self._blob_threads, lambda: self._blobs.find(tenant, digest))

    async def delete_blob(
        self, tenant: str, digest: str, *, unused_for_seconds: float = 0.0, last_put: float | None = None
    ) -> bool:
        """Delete a blob that was not put for this long, or since then."""
        return await self._run(
            self._blob_threads, lambda: self._blobs.delete(tenant, digest, unused_for_seconds, last_put)
        )

    async def scan_blobs(self, tenant: str) -> list[BlobInfo]:
        """List a tenant's blobs."""
        return await self._run(self._blob_threads, lambda: self._blobs.scan(tenant))

    async def sweep_blobs(self, tenant: str, *, older_than_seconds: float) -> list[str]:
        """Delete what killed writers have left."""
        return await self._run(self._blob_threads, lambda: self._blobs.sweep(tenant, older_than_seconds))

    async def get(self, key: str) -> Record | None:
        """Return one record."""
        return await self._run(self._record_thread, lambda: self._records.get(key))

    async def get_many(self, keys: Sequence[str]) -> list[Record | None]:
        """Return many records."""
        return await self._run(self._record_thread, lambda: [self._records.get(key) for key in keys])

    async def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, containing: str = ""
    ) -> list[Record]:
        """Return records by prefix, ordered by key."""
        return await self._run(self._record_thread, lambda: self._records.scan(prefix, after, limit, containing))

    async def transact(
        self,
        checks: Sequence[Condition] = (),
        puts: Sequence[Put] = (),
        deletes: Sequence[str] = (),
        appends: Sequence[Append] = (),
        adds: Sequence[Add] = (),
    ) -> dict[str, str]:
        """Do all or nothing."""
        etags, _ = await self._transact(checks, puts, deletes, appends, adds)
        return etags

    async def acquire_lease(self, key: str, owner: str, ttl_seconds: float) -> Lease | None:
        """Take a lease that nobody holds."""
        return await self._run(self._record_thread, lambda: self._records.acquire(key, owner, ttl_seconds))

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """Extend a lease."""
        return await self._run(self._record_thread, lambda: self._records.renew(lease, ttl_seconds))

    async def release_lease(self, lease: Lease) -> None:
        """Give a lease back."""
        await self._run(self._record_thread, lambda: self._records.release(lease))

    async def publish(self, log: str, payload: bytes) -> int:
        """Append one event."""
        _, seqs = await self._transact((), (), (), [Append(log, payload)], ())
        return seqs[0]

    async def subscribe(self, prefix: str, *, after: int | None = None) -> Subscription:
        """Follow logs by prefix."""
        if after is None:
            after = await self._run(self._record_thread, self._records.last_seq)
        subscription = _LogSubscription(self, prefix, after)
        self._subscriptions.add(subscription)
        return subscription

    async def read_log(self, prefix: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return past events."""
        events, _ = await self._run(self._record_thread, lambda: self._records.read_log(prefix, after, limit))
        return events

    async def read_tail(self, log: str, *, before: int | None = None, limit: int = 1000) -> list[Event]:
        """Return the last events of one log, newest first."""
        return await self._run(self._record_thread, lambda: self._records.read_tail(log, before, limit))

    async def trim_log(self, log: str, *, before_seq: int) -> int:
        """Delete old entries of one log."""
        return await self._run(self._record_thread, lambda: self._records.trim_log(log, before_seq))

    async def clear_quarantine(self, tenant: str, digest: str | None = None) -> int:
        """Delete what was set aside."""
        return await self._run(self._blob_threads, lambda: self._blobs.clear_quarantine(tenant, digest))

    async def erase_tenant(self, tenant: str) -> Mapping[str, int]:
        """Delete everything of a tenant."""
        counts = await self._run(self._record_thread, lambda: self._records.erase_tenant(check_tenant(tenant)))
        num_blobs = await self._run(self._blob_threads, lambda: self._blobs.erase(tenant))
        return {**counts, "blobs": num_blobs, "quarantined": await self.clear_quarantine(tenant)}

    async def erase(self) -> bool:
        """Empty the write-ahead log, which still has what was deleted."""
        return await self._run(self._record_thread, self._records.erase)

    async def close(self) -> None:
        """End all subscriptions, finish what is under way, close the file."""
        if self._closed:
            return
        self._closed = True
        for subscription in list(self._subscriptions):
            await subscription.aclose()
        self._record_thread.submit(self._records.close)
        await asyncio.to_thread(self._record_thread.shutdown)
        await asyncio.to_thread(self._blob_threads.shutdown)

    async def _transact(
        self,
        checks: Sequence[Condition],
        puts: Sequence[Put],
        deletes: Sequence[str],
        appends: Sequence[Append],
        adds: Sequence[Add],
    ) -> tuple[dict[str, str], list[int]]:
        needed = [check for check in checks if isinstance(check, HasBlob)]
        rest = [check for check in checks if not isinstance(check, HasBlob)]

        def work() -> tuple[dict[str, str], list[int]]:
            with self._blobs.renewing(needed):
                return self._records.transact(rest, puts, deletes, appends, adds)

        done = await self._run(self._record_thread, work)
        if appends:
            for subscription in list(self._subscriptions):
                subscription.wake()
        return done

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        if self._closed:
            raise StoreUnavailableError("the store is closed")
        try:
            done = await asyncio.get_running_loop().run_in_executor(threads, work)
        except (OSError, sqlite3.Error) as error:
            self._is_up = False
            what = error.strerror if isinstance(error, OSError) else error  # an OSError's own text shows our paths
            raise StoreUnavailableError(f"the store failed: {what}") from error
        self._is_up = True
        return done


class _LogSubscription:
    """Reads the durable log from a cursor; woken by this process's writes, by the clock for others'."""

    def __init__(self, store: EmbeddedStore, prefix: str, after: int) -> None:
        self._store = store
        self._prefix = prefix
        self._after = after
        self._pending: deque[Event] = deque()
        self._woken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ended = False

    def __aiter__(self) -> _LogSubscription:
        return self

    async def __anext__(self) -> Event:
        while not self._ended:
            if self._pending:
                return self._pending.popleft()
            self._woken.clear()
            # Cursor and buffer change together after the await: a cancelled reader loses nothing.
            events, self._after = await self._store._run(
                self._store._record_thread,
                lambda: self._store._records.read_log(self._prefix, self._after, 1000),
            )
            self._pending.extend(events)
            if not events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._store._poll_seconds):  # wait_for can swallow a cancellation
                        await self._woken.wait()
        raise StopAsyncIteration

    def wake(self) -> None:
        """Look at the log now; may be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the subscriber's loop may have been closed
            self._loop.call_soon_threadsafe(self._woken.set)

    async def aclose(self) -> None:
        """End the iteration."""
        self._ended = True
        self._store._subscriptions.discard(self)
        self.wake()


@contextlib.contextmanager
def _opening(root: Path) -> Iterator[None]:
    """Let one process at a time create the files: switching to WAL fails under a concurrent opener."""
    descriptor = os.open(root / "open.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        for folder in (root, root.parent):
            sync_folder(folder)
    finally:
        os.close(descriptor)
