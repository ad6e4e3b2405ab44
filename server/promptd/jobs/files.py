"""Training files: JSON lines that a tenant uploads once and names in many jobs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from promptd_store import (
    STORED_BYTES,
    Check,
    CheckFailedError,
    Content,
    HasBlob,
    Put,
    Store,
    check_room,
    check_tenant,
    drop_unnamed,
    hold,
    naming_blobs,
)
from promptd_store.schema import read_fields, stamped
from promptd_store.users import raise_if_erased, user_checks

from promptd.errors import InvalidRequestError, NotFoundError, PayloadTooLargeError
from promptd.jobs.keys import file_key, new_id

MAX_FILENAME_CHARS = 255
MAX_LINE_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
Files = list["FileRecord"]  # `list` is a method


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One uploaded file."""

    id: str
    tenant: str
    filename: str
    num_bytes: int
    digest: str
    """Of the blob; equal files of one tenant share it."""
    created_at: float
    """Seconds since 1970."""
    user: str | None = None
    """The end user of its tenant whom it belongs to, where it was said."""

    def to_bytes(self) -> bytes:
        """Write the record."""
        return json.dumps(stamped(asdict(self))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> FileRecord:
        """Read what `to_bytes` wrote."""
        return cls(**read_fields(cls, data))


class TrainingFiles:
    """A tenant's files. Absent and foreign ones look the same.

    Deleting drops the record; the blob goes with the next garbage collection, unless another record names it.
    """

    def __init__(self, store: Store, *, max_bytes: int = 64 << 20, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self.max_bytes = max_bytes

    async def create(self, tenant: str, filename: str, content: Content, *, user: str | None = None) -> FileRecord:
        """Store a file, durable on return; rows are looked at later, by the job that uses them.

        Raises `PayloadTooLargeError`, `InvalidRequestError` where the content cannot be JSON lines, or the store's
        `LimitReachedError`.
        """
        if not 0 < len(filename) <= MAX_FILENAME_CHARS or not filename.isprintable():
            raise InvalidRequestError(
                f"filename must have 1 to {MAX_FILENAME_CHARS} printable characters, got {filename[:80]!r}",
                param="file",
            )
        if len(content) > self.max_bytes:
            raise PayloadTooLargeError(
                f"file {filename!r} has {len(content)} bytes, at most {self.max_bytes} are allowed", param="file"
            )
        await asyncio.to_thread(check_lines, content, "file")
        checks = await user_checks(self._store, tenant, user)
        await check_room(self._store, tenant, {STORED_BYTES: len(content)})
        now = self._clock()
        record = FileRecord(
            new_id("file", now),
            check_tenant(tenant),
            filename,
            len(content),
            await self._store.put_blob(tenant, content),
            now,
            user,
        )
        key = file_key(tenant, record.id)
        added = hold(tenant, STORED_BYTES, len(content))

        async def write(needs: Sequence[HasBlob]) -> None:
            put = Put(key, record.to_bytes())
            await self._store.transact([Check(key, None), *checks, *needs], [put], adds=[added])

        try:
            await naming_blobs(self._store, tenant, {record.digest: content}, write)
        except CheckFailedError as error:
            await drop_unnamed(self._store, tenant, [record.digest])
            raise_if_erased(error, tenant, user)
            raise
        return record

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """Return one file's record."""
        stored = await self._store.get(file_key(tenant, file_id))
        if stored is None:
            raise _no_file(file_id)
        return FileRecord.from_bytes(stored.value)

    async def list(self, tenant: str, *, after: str | None = None, limit: int | None = None) -> Files:
        """Return the tenant's files, newest first, those behind the file `after`."""
        prefix = file_key(tenant, "")
        found = await self._store.scan(prefix, after=prefix + (after or ""), limit=limit)
        return [FileRecord.from_bytes(record.value) for record in found]

    async def content(self, tenant: str, file_id: str) -> bytes:
        """Return a file's bytes as they were uploaded."""
        record = await self.get(tenant, file_id)
        return await self._store.get_blob(tenant, record.digest)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file; jobs that still need its rows will fail with that reason."""
        key = file_key(tenant, file_id)
        stored = await self._store.get(key)
        try:
            if stored is None:
                raise _no_file(file_id)
            freed = hold(tenant, STORED_BYTES, -FileRecord.from_bytes(stored.value).num_bytes)
            await self._store.transact([Check(key, stored.etag)], deletes=[key], adds=[freed])
        except CheckFailedError:  # deleted by another call meanwhile
            raise _no_file(file_id) from None


def _no_file(file_id: str) -> NotFoundError:
    return NotFoundError(f"no file {file_id[:80]!r}", param="file_id", code="file_not_found")


def check_lines(content: Content, param: str) -> None:
    """Raise `InvalidRequestError` for bytes that are clearly no JSON lines: empty, binary, an endless line."""
    begin, is_empty = 0, True
    for number, line in enumerate(_lines(content), start=1):
        if len(line) > MAX_LINE_BYTES:
            length = _line_length(content, begin)
            raise _invalid(param, f"line {number}: has {length} bytes, at most {MAX_LINE_BYTES} are allowed")
        try:
            line.decode()
        except UnicodeDecodeError as error:
            place = begin + error.start
            raise _invalid(param, f"line {number}: not UTF-8 ({error.reason} at byte {place})") from None
        begin, is_empty = begin + len(line) + 1, is_empty and not line.strip()
    if is_empty:
        raise _invalid(param, "no rows at all")


def _lines(content: Content) -> Iterator[bytes]:
    """Read a piece at a time: what is stored need not be in memory. Of a line that is too long the rest is left out."""
    rest = b""
    for at in range(0, len(content), PIECE_BYTES):
        *lines, rest = (rest + content[at : at + PIECE_BYTES]).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE_BYTES:
            break
    yield rest


def _line_length(content: Content, begin: int) -> int:
    """Count the bytes from a place to the line's end, a piece at a time."""
    for at in range(begin, len(content), PIECE_BYTES):
        end = bytes(content[at : at + PIECE_BYTES]).find(b"\n")
        if end >= 0:
            return at + end - begin
    return len(content) - begin


def _invalid(param: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(problem, param=param, code="invalid_training_data")
