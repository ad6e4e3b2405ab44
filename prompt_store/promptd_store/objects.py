"""Bytes outside a record store: immutable objects under unique names, in a shared folder or an S3-compatible bucket."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from promptd_store.base import Content
from promptd_store.blobs import corpses, delete_corpses
from promptd_store.errors import StoreAddressError, StoreUnavailableError
from promptd_store.names import PUBLIC_TENANT
from promptd_store.synced import SyncedTree, sync_folder

_S3_CONFIG = {"connect_timeout": 3, "read_timeout": 8, "retries": {"mode": "standard", "total_max_attempts": 2}}
_S3_TRIES = 2
"""s3fs' own, around botocore's."""


class Objects(Protocol):
    """Blocking; names are `<tenant>/<aa>/<rest>`, and one that no tenant has. What `put` returned from is durable."""

    def put(self, name: str, data: Content) -> None:
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

    def clear_aside(self, tenant: str, digest: str | None = None, *, min_age_seconds: float | None = None) -> list[str]:
        """Delete what was set aside of a tenant, or of one blob (hex digits), so long ago at least; return names."""
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
            sync_folder(root)
            with contextlib.suppress(PermissionError):  # then it is not ours, and was there before
                sync_folder(root.parent)
        except OSError as error:
            raise StoreUnavailableError(f"cannot open the blobs' folder {root}: {error.strerror}") from error
        self._tree = SyncedTree(self._root)

    def put(self, name: str, data: Content) -> None:
        """Write a file."""
        self._tree.write(self._root / name, data)

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

    def clear_aside(self, tenant: str, digest: str | None = None, *, min_age_seconds: float | None = None) -> list[str]:
        """Delete files of the quarantine."""
        return delete_corpses(self._aside, tenant, digest, min_age_seconds=min_age_seconds)

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
            is_s3 = url.startswith("s3://")
            options = {"config_kwargs": _S3_CONFIG} if is_s3 else {}
            self._files, root = url_to_fs(url, use_listings_cache=False, **options)  # others write there, too
            if is_s3:
                self._files.retries = _S3_TRIES
        except (ImportError, ValueError) as error:
            raise StoreAddressError(f"blobs cannot be kept at {url!r}: {error}") from error
        self._root = root.rstrip("/")

    def put(self, name: str, data: Content) -> None:
        """Write one object."""
        self._files.pipe_file(f"{self._root}/objects/{name}", bytes(data))

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

    def clear_aside(self, tenant: str, digest: str | None = None, *, min_age_seconds: float | None = None) -> list[str]:
        """Delete objects of the quarantine."""
        top = f"{self._root}/quarantine/"
        try:
            found = self._files.find(top)
        except FileNotFoundError:
            return []
        names = (path.removeprefix(top) for path in found)
        gone = corpses(tenant, names, digest, min_age_seconds=min_age_seconds)
        for name in gone:
            self._files.rm_file(top + name)
        return gone

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


def open_objects(address: str) -> Objects:
    """Open a folder, or a bucket by its URL, and see that an object can be written there, read and deleted.

    Raises `StoreUnavailableError` where it cannot, `StoreAddressError` for an address that is none.
    """
    objects = BucketObjects(address) if "://" in address else FolderObjects(Path(address))
    name = f"{PUBLIC_TENANT}/00/probe.{secrets.token_hex(8)}"
    try:
        objects.put(name, b"probe")
        objects.get(name)
        objects.delete(name)
    except Exception as error:  # each kind of bucket has errors of its own
        raise StoreUnavailableError(f"blobs cannot be kept in {address}: {error}") from error
    return objects
