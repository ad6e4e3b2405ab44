"""A folder as the root of a system, entered by chroot: what a container engine would run, without one.

Each process has mounts and process numbers of its own; what it is shown of this machine, its tree does not keep.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RUN_SECONDS = 3600
NETWORK = ("/etc/resolv.conf", "/etc/hosts")


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine, shown at a place of the tree; without a source an empty one in memory."""

    target: str
    source: Path | None = None
    is_writable: bool = False


class Tree:
    """Entered by root alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def inside(self, path: str) -> Path:
        """A path of the tree, as it is seen from here."""
        return self.root / path.lstrip("/")

    @property
    def num_bytes(self) -> int:
        """Of all files, those with several names once."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - some ten thousand files
                found[status.st_ino] = status.st_size
        return sum(found.values())

    def command(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        user: str | None = None,
        folder: str = "/",
        mounts: Sequence[Mount] = (),
        is_read_only: bool = False,
    ) -> list[str]:
        """What runs a command in the tree, as the first process there; with `user` (uid:gid) without any right."""
        root = shlex.quote(str(self.root))
        steps = [f"mount --bind {root} {root}"]
        if is_read_only:
            steps.append(f"mount -o remount,bind,ro {root}")
        steps.append(f"mount -t proc proc {root}/proc")
        for mount in mounts:
            target = shlex.quote(str(self.inside(mount.target)))
            if mount.source is None:
                steps.append(f"mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs {target}")
            else:
                steps.append(f"mount --bind {shlex.quote(str(mount.source))} {target}")
                if not mount.is_writable:
                    steps.append(f"mount -o remount,bind,ro {target}")
        shell = "\n".join(["set -e", *steps, 'exec chroot "$@"'])
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", shell, "bash"]
        return [*own, str(self.root), *as_user(user, environment, folder), *words]

    def run(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        user: str | None = None,
        mounts: Sequence[Mount] = (),
    ) -> str:
        """Run a command to its end and return what it said; raises where it fails."""
        with self._places(mounts):
            command = self.command(words, environment, user=user, mounts=mounts)
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_SECONDS, check=False
            )
        if done.returncode:
            raise AssertionError(f"{shlex.join(words)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    @contextlib.contextmanager
    def _places(self, mounts: Sequence[Mount]) -> Iterator[None]:
        """Make what is mounted on where it is not there, and take it away afterwards."""
        made: list[Path] = []
        for mount in mounts:
            place = self.inside(mount.target)
            for parent in reversed([place, *place.parents]):
                if not parent.exists():
                    made.append(parent)
                    if parent == place and mount.source is not None and mount.source.is_file():
                        parent.touch()
                    else:
                        parent.mkdir()
        try:
            yield
        finally:
            for path in reversed(made):
                path.unlink() if path.is_file() else path.rmdir()


def as_user(user: str | None, environment: Mapping[str, str], folder: str) -> list[str]:
    """What stands before a command inside: who it is, and what it is told."""
    who: list[str] = []
    if user is not None:
        uid, _, gid = user.partition(":")
        who = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        who += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return [*who, "env", "-i", "-C", folder, *(f"{name}={value}" for name, value in environment.items())]


def machine_mounts() -> list[Mount]:
    """How names are found on this machine."""
    return [Mount(one, Path(one).resolve()) for one in NETWORK if Path(one).exists()]


def can_be_entered() -> str | None:
    """Why no tree can be entered here, if so."""
    if os.geteuid() != 0:
        return "chroot and mounts need root"
    missing = [one for one in ("debootstrap", "unshare", "nsenter", "setpriv") if shutil.which(one) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install debootstrap util-linux"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "this machine does not allow mounts of one's own"
    return None
