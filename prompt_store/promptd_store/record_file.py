"""Records, leases and logs in one SQLite file (WAL, synchronous=FULL). Blocking: call it from one thread."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from promptd_store.base import Add, Append, Check, Event, Lease, Put, Record
from promptd_store.errors import (
    CheckFailedError,
    LeaseLostError,
    LimitReachedError,
    StoreUnavailableError,
    TenantErasedError,
)
from promptd_store.names import ERASED, tenant_of

BUSY_TIMEOUT_SECONDS = 10.0

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records
    (key TEXT PRIMARY KEY, value BLOB NOT NULL, etag INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log
    (seq INTEGER PRIMARY KEY AUTOINCREMENT, log TEXT NOT NULL, payload BLOB NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS log_by_name ON log (log, seq);
CREATE TABLE IF NOT EXISTS leases
    (key TEXT PRIMARY KEY, owner TEXT, epoch INTEGER NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY CHECK (id = 0), value INTEGER NOT NULL);
INSERT OR IGNORE INTO counter VALUES (0, 0);
PRAGMA user_version = 1;
"""
_LAST_CHAR = "\U0010ffff"


class RecordFile:
    """One connection. Other processes may have the same file open."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Only a file that is not there yet is opened here: closing any other descriptor of a database drops the
        # POSIX locks that SQLite holds on it for this process's other connections.
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        self._connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten with zeros
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            self._connection.close()
            raise StoreUnavailableError(
                f"{path} has schema version {version}, written by a newer release; this one knows {SCHEMA_VERSION}"
            )
        self._connection.executescript(_SCHEMA)

    def erase(self) -> bool:
        """Empty the write-ahead log into the file; False where another connection reads it now: the next call does."""
        ((is_busy, _, _),) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return not is_busy

    def erase_tenant(self, tenant: str) -> dict[str, int]:
        """Delete all records, log entries and leases of a tenant."""
        first = f"{{{tenant}}}:"
        bounds = (first, first + _LAST_CHAR)
        with self._writing() as sql:
            num_records = sql("DELETE FROM records WHERE key >= ? AND key < ?", bounds).rowcount
            num_entries = sql("DELETE FROM log WHERE log >= ? AND log < ?", bounds).rowcount
            sql("DELETE FROM leases WHERE key >= ? AND key < ?", bounds)
        return {"records": num_records, "log_entries": num_entries}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def get(self, key: str) -> Record | None:
        """Read one record."""
        row = self._connection.execute("SELECT key, value, etag FROM records WHERE key = ?", (key,)).fetchone()
        return None if row is None else Record(row[0], row[1], str(row[2]))

    def scan(self, prefix: str, after: str, limit: int | None, containing: str) -> list[Record]:
        """Read records by prefix, ordered by key."""
        rows = self._connection.execute(
            "SELECT key, value, etag FROM records WHERE key >= ? AND key < ? AND key > ?"
            " AND instr(lower(substr(key, ?)), ?) > 0 ORDER BY key LIMIT ?",
            (
                prefix,
                prefix + _LAST_CHAR,
                after,
                len(prefix) + 1,
                containing.lower(),
                -1 if limit is None else limit,
            ),
        )
        return [Record(key, value, str(etag)) for key, value, etag in rows]

    def transact(
        self,
        checks: Sequence[Check | Lease],
        puts: Sequence[Put],
        deletes: Sequence[str],
        appends: Sequence[Append],
        adds: Sequence[Add],
    ) -> tuple[dict[str, str], list[int]]:
        """Check and write all or nothing; return the etags of the puts and the seqs of the appends."""
        with self._writing() as sql:
            for check in checks:
                self._check(check)
            written = [put.key for put in puts] + [add.key for add in adds] + [append.log for append in appends]
            for tenant in sorted({tenant_of(key) for key in written}):
                if self.get(ERASED + tenant) is not None:
                    raise TenantErasedError(tenant)
            etag = sql("UPDATE counter SET value = value + 1 RETURNING value").fetchone()[0]
            for key in deletes:
                sql("DELETE FROM records WHERE key = ?", (key,))
            for add in adds:
                self._add(add, etag)
            for put in puts:
                sql("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (put.key, put.value, etag))
            seqs = []
            for append in appends:
                row = (append.log, append.payload, self._clock())
                seqs.append(sql("INSERT INTO log (log, payload, at) VALUES (?, ?, ?)", row).lastrowid or 0)
        return {put.key: str(etag) for put in puts}, seqs

    def acquire(self, key: str, owner: str, ttl_seconds: float) -> Lease | None:
        """Take a lease that is free or has run out."""
        with self._writing() as sql:
            now = self._clock()
            row = sql("SELECT owner, epoch, expires_at FROM leases WHERE key = ?", (key,)).fetchone()
            if row is not None and row[0] is not None and row[2] > now:
                return None
            lease = Lease(key, owner, 1 if row is None else row[1] + 1, now + ttl_seconds)
            sql("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (key, owner, lease.epoch, lease.expires_at))
        return lease

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        """Extend a lease of the present epoch."""
        with self._writing() as sql:
            self._check(lease)
            expires_at = self._clock() + ttl_seconds
            sql("UPDATE leases SET expires_at = ? WHERE key = ?", (expires_at, lease.key))
        return Lease(lease.key, lease.owner, lease.epoch, expires_at)

    def release(self, lease: Lease) -> None:
        """Free a lease; the row stays, because its epoch must never come back."""
        with self._writing() as sql:
            sql("UPDATE leases SET owner = NULL WHERE key = ? AND epoch = ?", (lease.key, lease.epoch))

    def last_seq(self) -> int:
        """Return the newest seq ever given."""
        row = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetchone()
        return 0 if row is None else int(row[0])

    def read_log(self, prefix: str, after: int, limit: int) -> tuple[list[Event], int]:
        """Return events in order and the seq up to which nothing was left out."""
        newest = max(self.last_seq(), after)
        rows = self._connection.execute(
            "SELECT seq, log, payload, at FROM log WHERE seq > ? AND seq <= ? AND log >= ? AND log < ?"
            " ORDER BY seq LIMIT ?",
            (after, newest, prefix, prefix + _LAST_CHAR, limit),
        )
        events = [Event(*row) for row in rows]
        return events, events[-1].seq if len(events) == limit else newest

    def read_tail(self, log: str, before: int | None, limit: int) -> list[Event]:
        """Return the last events of one log before a seq, newest first."""
        rows = self._connection.execute(
            "SELECT seq, log, payload, at FROM log WHERE log = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
            (log, (1 << 63) - 1 if before is None else before, limit),
        )
        return [Event(*row) for row in rows]

    def trim_log(self, log: str, before_seq: int) -> int:
        """Delete old entries of one log."""
        with self._writing() as sql:
            return sql("DELETE FROM log WHERE log = ? AND seq < ?", (log, before_seq)).rowcount

    def _add(self, add: Add, etag: int) -> None:
        held = self._number(add.key) or 0
        limit = None if add.limit_key is None else self._number(add.limit_key)
        if add.amount > 0 and limit is not None and held + add.amount > limit:
            raise LimitReachedError(add.key, held, add.amount, limit)
        if held + add.amount == 0:
            self._connection.execute("DELETE FROM records WHERE key = ?", (add.key,))
        else:
            row = (add.key, b"%d" % (held + add.amount), etag)
            self._connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", row)

    def _number(self, key: str) -> int | None:
        record = self.get(key)
        return None if record is None else int(record.value)

    def _check(self, check: Check | Lease) -> None:
        if isinstance(check, Lease):
            row = self._connection.execute("SELECT owner, epoch FROM leases WHERE key = ?", (check.key,)).fetchone()
            if row != (check.owner, check.epoch):
                raise LeaseLostError.of(check.key, check.owner, check.epoch)
            return
        record = self.get(check.key)
        actual = None if record is None else record.etag
        if actual != check.etag:
            raise CheckFailedError(check.key, check.etag, actual)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """Hold the file's write lock; commit (which fsyncs) on success, else roll back."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
