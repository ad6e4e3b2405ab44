"""The file system of an image, as its Dockerfile says: Debian's own packages are the base, chroot runs the steps."""

from __future__ import annotations

import ast
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from tests.docker.dockerfile import Instruction, Stage, context, pairs, stages
from tests.docker.tree import NETWORK, PATH, RUN_SECONDS, Mount, Tree, machine_mounts

PACKAGES = "ca-certificates,python3,python3-venv,python-is-python3"
"""What the official Python images have and Debian's smallest system has not."""
ABOUT_PACKAGES = {"cert", "extra-index-url", "find-links", "index-url", "no-index", "proxy", "timeout", "trusted-host"}
"""Settings of pip that say where packages come from; they are given to the steps, and are no part of the image."""
TORCH_INDEX, PYPI = "https://download.pytorch.org/whl/cpu", "https://pypi.org/simple"
KEPT = {"LABEL", "USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Image:
    """A built one."""

    tree: Tree
    stage: Stage
    environment: Mapping[str, str]
    num_base_bytes: int

    @property
    def user(self) -> str:
        """`uid:gid` of its processes."""
        return self.stage.last("USER").rest

    @property
    def folder(self) -> str:
        """Where they start."""
        return self.stage.last("WORKDIR").rest

    @property
    def words(self) -> list[str]:
        """What it runs unless told otherwise."""
        return self.stage.last("ENTRYPOINT").words + self.stage.last("CMD").words


def make_base(name: str, folder: Path) -> Tree:
    """Make what stands in the place of `python:3.12.8-slim-bookworm`: the same Debian with its own Python."""
    suite = name.rpartition("-")[2]
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {suite}"]
    mirrors = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout.split()
    words = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(folder), *mirrors[:1]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    base = Tree(folder)
    for path in (*NETWORK, "/etc/hostname"):  # of the machine that it was made on
        base.inside(path).unlink(missing_ok=True)
    for path in base.inside("/var/cache/apt/archives").glob("*.deb"):
        path.unlink()
    shutil.rmtree(base.inside("/var/lib/apt/lists"))
    base.inside("/var/lib/apt/lists/partial").mkdir(parents=True)
    return base


def build(dockerfile: Path, root: Path, folder: Path) -> Image:
    """Carry out all stages over the context `root`; the last one is the image.

    Where torch's own index cannot be reached, packages all come from where pip finds them on this machine.
    """
    environment, mounts = pip_settings()
    mounts += machine_mounts()
    arguments = {} if is_reached(TORCH_INDEX) else {"TORCH_INDEX": environment.get("PIP_INDEX_URL", PYPI)}
    is_sent = context(root)
    trees: dict[str, Tree] = {}
    variables: dict[str, str] = {}
    for stage in stages(dockerfile):
        if not trees:
            trees["base"] = make_base(stage.base, folder / "base")
        tree = Tree(folder / stage.name)
        subprocess.run(["cp", "-a", trees["base"].root, tree.root], check=True, timeout=RUN_SECONDS)
        trees[stage.name] = tree
        variables, given = {"PATH": PATH}, {}
        for one in stage.instructions:
            if one.word == "ARG":
                name, _, value = one.rest.partition("=")
                given[name] = arguments.get(name, value)
            elif one.word == "ENV":
                variables |= pairs(one.filled(given | variables))
            elif one.word == "RUN":
                tree.run(["/bin/sh", "-c", one.rest], given | variables | environment, mounts=mounts)
            elif one.word == "COPY":
                source = trees[one.flags["from"]].root if "from" in one.flags else root
                copy(one, source, tree.root, is_sent if source == root else lambda path: True)
            elif one.word not in KEPT:
                raise ValueError(f"{one.word} is not understood here")
    return Image(tree, stage, variables, trees["base"].num_bytes)


def is_reached(index: str) -> bool:
    """Whether a package index answers."""
    with contextlib.suppress(OSError), urlopen(f"{index}/torch/", timeout=10):  # noqa: S310 - it is ours, above
        return True
    return False


def copy(instruction: Instruction, source: Path, target: Path, is_sent: Callable[[Path], bool]) -> None:
    """Copy files, and what is in folders, as root's."""
    *names, into = instruction.rest.split()
    for name in names:
        path = source / name.lstrip("/")
        assert is_sent(path), f"{name} is not sent to the builder"
        place = target / into.lstrip("/") / (path.name if into.endswith("/") else "")
        if path.is_dir():
            hidden = lambda at, found: [one for one in found if not is_sent(Path(at) / one)]  # noqa: E731
            shutil.copytree(path, target / into.lstrip("/"), symlinks=True, ignore=hidden, dirs_exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def pip_settings() -> tuple[dict[str, str], list[Mount]]:
    """This machine's way to packages: variables for pip, and the places here that they name."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.findall(r"^(\S+?)\.([\w-]+)=(.*)$", done.stdout, re.MULTILINE)
    found.sort(key=lambda one: one[0] == ":env:")  # which has the last word
    settings = {name: str(ast.literal_eval(value)) for _, name, value in found if name in ABOUT_PACKAGES}
    words = [word for value in settings.values() for word in value.split()]
    # An index in a folder has its files beside its pages.
    paths = [Path(urlsplit(word).path).parent if word.startswith("file:") else Path(word) for word in words]
    mounts = [Mount(str(path), path.resolve()) for path in dict.fromkeys(paths) if path.is_absolute()]
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in settings.items()}, mounts
