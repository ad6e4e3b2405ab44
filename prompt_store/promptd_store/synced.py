"""Files and folders that survive a power cut: bytes are synced, and so is every name that leads to them."""

from __future__ import annotations

import os
import uuid
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from promptd_store.base import Content

TEMP = ".tmp-"
"""What the name of a file begins with that is being written."""


def write_synced(path: Path, data: Content) -> None:
    """Write a new file whose bytes are durable; its name is once the folder is synced."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SyncedTree:
    """Files `<tenant>/<aa>/<rest>` below a root, which is there and whose own name is durable."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._synced: set[Path] = set()

    def write(self, path: Path, data: Content, naming: AbstractContextManager[None] | None = None) -> None:
        """Write a file that is there whole or not at all; durable on return. It gets its name within `naming`."""
        self._make(path.parent)
        temp = path.with_name(f"{TEMP}{uuid.uuid4().hex}")
        try:
            write_synced(temp, data)
            with naming or nullcontext():
                temp.rename(path)
                sync_folder(path.parent)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise

    def _make(self, folder: Path) -> None:
        """Make a folder whose own name is durable; each process makes sure of that itself, once.

        That it is there says nothing: another process may have made it and not synced it yet.
        """
        if folder in self._synced and folder.is_dir():
            return
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self._root)
        sync_folder(folder.parent)
        self._synced.add(folder)
