"""Power cuts: bytes that were not synced are gone, and so are names in folders that were not synced since."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest

_RECORDER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static void synced(int fd) {
    char link[64], path[4096], line[4200];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || fstat(fd, &status) || !S_ISREG(status.st_mode)) return;
    path[length] = 0;
    int log = open(getenv("SYNC_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    int size = snprintf(line, sizeof line, "%lld %s\n", (long long)status.st_size, path);
    if (write(log, line, size) != size) abort();
    close(log);
}
int fsync(int fd) { int done = ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); if (!done) synced(fd); return done; }
int fdatasync(int fd) {
    int done = ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
    if (!done) synced(fd);
    return done;
}
"""


def build_recorder(folder: Path) -> Path:
    """Build a library to preload, which writes into the file SYNC_LOG how much of each file a process has synced."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the recorder of syncs")
    (folder / "recorder.c").write_text(_RECORDER)
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", folder / "recorder.so", folder / "recorder.c", "-ldl"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    return folder / "recorder.so"


def cut_redis(folder: Path, log: Path) -> int:
    """Drop from a Redis' append-only files what was never synced; return how many bytes went."""
    synced: dict[str, int] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        size, path = line.split(" ", 1)
        synced[path] = int(size)
    dropped = 0
    for path in (folder / "appendonlydir").glob("*.incr.aof"):
        kept = synced.get(str(path), 0)
        dropped += path.stat().st_size - kept
        os.truncate(path, kept)
    return dropped


class OwnSyncs:
    """What this process has synced, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sizes: dict[int, int] = {}
        """By inode: bytes of a file."""
        self._names: dict[int, set[str]] = {}
        """By inode: what was in a folder."""
        self._lock = threading.Lock()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._noting)

    def cut(self, folder: Path) -> int:
        """Drop from a folder what was not synced; return how many files and folders went, or lost bytes."""
        num_hurt, left = 0, set()
        for place, folders, names in os.walk(folder):
            here = Path(place)
            left.add(here.stat().st_ino)
            kept = self._names.get(here.stat().st_ino, set())
            for name in {*folders, *names} - kept:
                num_hurt += 1
                shutil.rmtree(here / name) if name in folders else (here / name).unlink()
            folders[:] = [name for name in folders if name in kept]
            for name in kept & set(names):
                status = (here / name).stat()
                left.add(status.st_ino)
                if (size := self._sizes.get(status.st_ino, 0)) < status.st_size:
                    num_hurt += 1
                    os.truncate(here / name, size)
        self._sizes = {inode: size for inode, size in self._sizes.items() if inode in left}  # others come again
        self._names = {inode: names for inode, names in self._names.items() if inode in left}
        return num_hurt

    def _noting(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        inode, names = status.st_ino, set(os.listdir(descriptor)) if stat.S_ISDIR(status.st_mode) else set()
        self._fsync(descriptor)
        with self._lock:  # of two threads that sync one folder the first to look may be the last to be done
            self._sizes[inode] = max(status.st_size, self._sizes.get(inode, 0))
            self._names[inode] = names | self._names.get(inode, set())
