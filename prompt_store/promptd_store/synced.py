"""Files and folders that survive a power cut: bytes are synced, and so is every name that leads to them."""

from __future__ import annotations

import os
from pathlib import Path

from promptd_store.base import Content


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


class SyncedFolders:
    """Folders `<tenant>/<aa>` below a root, which is there and whose own name is durable."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._synced: set[Path] = set()

    def make(self, folder: Path) -> None:
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
