"""Bytes outside a record store: immutable objects under unique names, in a shared folder or an S3-compatible bucket."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from promptd_store.blobs import old_corpses, sync_folder
from promptd_store.errors import StoreAddressError, StoreUnavailableError


class Objects(Protocol):
    """Blocking; names are `<tenant>/<aa>/<rest>`. What `put` returned from is durable."""

    def put(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet."""
        ...

    def get(self, name: str) -> bytes:
        """Read one; raises FileNotFoundError."""
        ...

    def delete(self, name: str) -> None:
        """Delete one; nothing happens where it is gone."""
        ...

    def set_aside(self, name: str) -> None:
        """Move a corrupt object where no name leads to it."""
        ...

    def sweep_aside(self, tenant: str) -> list[str]:
        """Delete what was set aside of a tenant's long ago; return the names."""
        ...

    def clear_aside(self, tenant: str, digest: str | None) -> int:
        """Delete what was set aside of a tenant, or of one blob (hex digits); return how many."""
        ...

    def scan(self, tenant: str) -> Iterator[tuple[str, float]]:
        """Yield a tenant's objects with their age in seconds."""
        ...


class FolderObjects:
    """A folder that all replicas see. Synced before it is named, as the embedded store does."""

    def __init__(self, root: Path) -> None:
        try:
            self._root, self._aside = root / "objects", root / "quarantine"
            for folder in (self._root, self._aside):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailableError(f"cannot open the blobs' folder {root}: {error.strerror}") from error

    def put(self, name: str, data: bytes) -> None:
        """Write, sync, name, sync the name."""
        path = self._root / name
        if not path.parent.is_dir():
            path.parent.parent.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._root)
            sync_folder(path.parent.parent)
        temp = path.with_name(f".tmp-{path.name}")
        try:
            with os.fdopen(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temp.rename(path)
            sync_folder(path.parent)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise

    def get(self, name: str) -> bytes:
        """Read a file."""
        return (self._root / name).read_bytes()

    def delete(self, name: str) -> None:
        """Delete a file."""
        (self._root / name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        """Move a file to the quarantine."""
        with contextlib.suppress(FileNotFoundError):
            (self._root / name).rename(self._aside / f"{name.replace('/', '.')}.{time.time_ns()}")

    def sweep_aside(self, tenant: str) -> list[str]:
        """Delete old files of the quarantine."""
        gone = old_corpses(tenant, (path.name for path in self._aside.iterdir()))
        for name in gone:
            (self._aside / name).unlink(missing_ok=True)
        return gone

    def clear_aside(self, tenant: str, digest: str | None) -> int:
        """Delete files of the quarantine."""
        gone = [path for path in self._aside.iterdir() if _is_aside(path.name, tenant, digest)]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    def scan(self, tenant: str) -> Iterator[tuple[str, float]]:
        """List files, also those of writers that were killed while writing."""
        now = time.time()
        for path in (self._root / tenant).glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                yield str(path.relative_to(self._root)), now - path.stat().st_mtime


class BucketObjects:
    """A bucket, or whatever else fsspec reaches (`s3://bucket/folder` needs the s3 extra). Its puts are atomic."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._files: Any
            self._files, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreAddressError(f"blobs cannot be kept at {url!r}: {error}") from error
        self._root = root.rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        """Write one object."""
        self._files.pipe_file(f"{self._root}/objects/{name}", data)

    def get(self, name: str) -> bytes:
        """Read one object."""
        data: bytes = self._files.cat_file(f"{self._root}/objects/{name}")
        return data

    def delete(self, name: str) -> None:
        """Delete one object."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/objects/{name}")

    def set_aside(self, name: str) -> None:
        """Copy an object to the quarantine, then delete it."""
        with contextlib.suppress(FileNotFoundError):
            aside = f"{self._root}/quarantine/{name.replace('/', '.')}.{time.time_ns()}"
            self._files.pipe_file(aside, self._files.cat_file(f"{self._root}/objects/{name}"))
            self._files.rm_file(f"{self._root}/objects/{name}")

    def sweep_aside(self, tenant: str) -> list[str]:
        """Delete old objects of the quarantine."""
        top = f"{self._root}/quarantine/"
        try:
            found = self._files.find(top)
        except FileNotFoundError:
            return []
        gone = old_corpses(tenant, (path.removeprefix(top) for path in found))
        for name in gone:
            self._files.rm_file(top + name)
        return gone

    def clear_aside(self, tenant: str, digest: str | None) -> int:
        """Delete objects of the quarantine."""
        try:
            found = self._files.find(f"{self._root}/quarantine")
        except FileNotFoundError:
            return 0
        gone = [path for path in found if _is_aside(path.rpartition("/")[2], tenant, digest)]
        for path in gone:
            self._files.rm_file(path)
        return len(gone)

    def scan(self, tenant: str) -> Iterator[tuple[str, float]]:
        """List objects."""
        now, top = time.time(), f"{self._root}/objects/"
        try:
            found = self._files.find(f"{top}{tenant}", detail=True)
        except FileNotFoundError:
            return
        for path, status in found.items():
            at = status.get("LastModified") or status.get("created") or status.get("mtime")
            seconds = at.timestamp() if hasattr(at, "timestamp") else float(at or now)
            yield path.removeprefix(top), now - seconds


def _is_aside(name: str, tenant: str, digest: str | None) -> bool:
    wanted = digest or "[0-9a-f]{64}"
    return bool(re.fullmatch(rf"{re.escape(tenant)}\.[0-9a-f]{{2}}\.{wanted}\.[0-9a-f]+\.[0-9]+", name))


def open_objects(address: str) -> Objects:
    """Open a folder, or a bucket by its URL."""
    return BucketObjects(address) if "://" in address else FolderObjects(Path(address))
