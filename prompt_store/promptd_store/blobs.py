"""Content-addressed files: written once, fsynced before they are named, checked whenever they are read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from promptd_store.base import BlobInfo, Content, HasBlob
from promptd_store.errors import BlobCorruptError, BlobNotFoundError
from promptd_store.names import check_tenant
from promptd_store.synced import TEMP, SyncedTree, sync_folder

STALE_TEMP_SECONDS = 3600.0
QUARANTINE_SECONDS = 30 * 86400.0
"""How long corrupt bytes can be looked at."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


class BlobFolder:
    """Blobs under `root/blobs/<tenant>/<aa>/<hex>`; what turns out corrupt is moved to `root/quarantine`.

    Safe for many threads and processes: a name appears by rename, and `flock` orders renewals and deletions.
    """

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._quarantine = root / "quarantine"
        for folder in (self._blobs, self._quarantine):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = root / "blobs.lock"
        self._tree = SyncedTree(self._blobs)
        for folder in self._blobs.iterdir():
            self._sweep(folder, STALE_TEMP_SECONDS)

    def put(self, tenant: str, data: Content) -> str:
        """Store bytes durably and return their digest; an equal blob that is already there is only renewed."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(tenant, digest)
        if not (self._holds(path, len(data)) and self._renewed(path)):
            self._tree.write(path, data, self._locked())
        return "sha256:" + digest

    def get(self, tenant: str, digest: str) -> bytes:
        """Read and check one blob."""
        path = self._path(tenant, digest_hex(digest))
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobNotFoundError(f"no blob {digest}", param=digest) from None
        if hashlib.sha256(data).hexdigest() != path.name:
            self._set_aside(tenant, path)
            raise BlobCorruptError(f"blob {digest} does not have its digest any more; set aside", param=digest)
        return data

    def find(self, tenant: str, digest: str) -> BlobInfo | None:
        """Return size and age of a file."""
        return _info(self._path(tenant, digest_hex(digest)))

    def delete(self, tenant: str, digest: str, unused_for_seconds: float, last_put: float | None) -> bool:
        """Delete a file that was not put for this long, or since then."""
        path = self._path(tenant, digest_hex(digest))
        with self._locked():
            found = _info(path)
            if found is None or time.time() - found.last_put < unused_for_seconds:
                return False
            if last_put not in (None, found.last_put):
                return False
            path.unlink()
            sync_folder(path.parent)
        return True

    @contextlib.contextmanager
    def renewing(self, needed: Sequence[HasBlob]) -> Iterator[None]:
        """Around a step that names blobs: they are there, nobody deletes them in it, and it leaves them young."""
        if not needed:
            yield
            return
        paths = [self._path(one.tenant, digest_hex(one.digest)) for one in needed]
        with self._locked():
            for one, path in zip(needed, paths, strict=True):
                if not path.exists():
                    raise BlobNotFoundError(f"no blob {one.digest}", param=one.digest)
            yield
            for path in paths:
                _renew(path)

    def scan(self, tenant: str) -> list[BlobInfo]:
        """List a tenant's blobs."""
        paths = sorted((self._blobs / check_tenant(tenant)).glob("??/" + "[0-9a-f]" * 64))
        return [found for found in map(_info, paths) if found is not None]

    def sweep(self, tenant: str, older_than_seconds: float) -> list[str]:
        """Remove what writers left behind that were killed before renaming, and what was long set aside; return it."""
        gone = self._sweep(self._blobs / check_tenant(tenant), older_than_seconds)
        return gone + delete_corpses(self._quarantine, tenant, min_age_seconds=QUARANTINE_SECONDS)

    def erase(self, tenant: str) -> int:
        """Delete all of a tenant's files, also half-written ones; return how many blobs."""
        found = self.scan(tenant)
        with self._locked():
            shutil.rmtree(self._blobs / tenant, ignore_errors=True)
            sync_folder(self._blobs)
        return len(found)

    def clear_quarantine(self, tenant: str, digest: str | None) -> int:
        """Delete what was set aside, of one blob or of all; return how many."""
        wanted = None if digest is None else digest_hex(digest)
        return len(delete_corpses(self._quarantine, check_tenant(tenant), wanted))

    def _sweep(self, folder: Path, older_than_seconds: float) -> list[str]:
        gone = []
        for temp in folder.glob(f"*/{TEMP}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - temp.stat().st_mtime > older_than_seconds:
                    temp.unlink()
                    gone.append(temp.name)
        return gone

    def _path(self, tenant: str, digest: str) -> Path:
        return self._blobs / check_tenant(tenant) / digest[:2] / digest

    def _holds(self, path: Path, num_bytes: int) -> bool:
        """Whether a file has what its name says. Not behind the lock, for which all writers wait: it may be large."""
        try:
            if path.stat().st_size != num_bytes:
                return False
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == path.name
        except FileNotFoundError:
            return False

    def _renewed(self, path: Path) -> bool:
        """Make a file younger; False where it has gone."""
        with self._locked(), contextlib.suppress(FileNotFoundError):
            _renew(path)
            sync_folder(path.parent)
            return True
        return False

    def _set_aside(self, tenant: str, path: Path) -> None:
        """Move a corrupt file away, unless a writer has replaced it by a good one in the meantime."""
        with self._locked(), contextlib.suppress(FileNotFoundError):
            if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                path.rename(self._quarantine / f"{tenant}.{path.name}.{time.time_ns()}")
                sync_folder(path.parent)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _info(path: Path) -> BlobInfo | None:
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return BlobInfo("sha256:" + path.name, status.st_size, status.st_mtime)
    return None


def _renew(path: Path) -> None:
    """Make a file young; the system's own clock for files ticks too slowly to tell two renewals apart."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def digest_hex(digest: str) -> str:
    """Return the hex digits of `sha256:…`; raises BlobNotFoundError for anything else."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise BlobNotFoundError(f"{digest[:80]!r} is not a digest", param="digest")
    return match.group(1)


def corpses(
    tenant: str, names: Iterable[str], digest: str | None = None, *, min_age_seconds: float | None = None
) -> list[str]:
    """Return which `<tenant>.…<hex digest>….<nanoseconds>` of a quarantine are a tenant's: of one blob or of all, and
    set aside at least so long ago."""
    hexes = digest or "[0-9a-f]{64}"
    pattern = re.compile(rf"{re.escape(tenant)}\.(?:[0-9a-f]{{2}}\.)?{hexes}\.(?:[0-9a-f]{{16}}\.)?([0-9]+)")
    found = [(name, pattern.fullmatch(name)) for name in names]
    if min_age_seconds is None:
        return [name for name, match in found if match is not None]
    before = time.time_ns() - round(min_age_seconds * 1e9)
    return [name for name, match in found if match is not None and int(match[1]) < before]


def delete_corpses(
    folder: Path, tenant: str, digest: str | None = None, *, min_age_seconds: float | None = None
) -> list[str]:
    """Delete such files of a folder; return their names."""
    gone = corpses(tenant, (path.name for path in folder.iterdir()), digest, min_age_seconds=min_age_seconds)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    if gone:
        sync_folder(folder)
    return gone
