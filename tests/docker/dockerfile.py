"""Dockerfiles as ours are written: read here, and refused where they use what is not understood here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Instruction:
    """One: its word, its `--flags`, and what follows them, continued lines joined."""

    word: str
    flags: Mapping[str, str]
    rest: str

    def filled(self, variables: Mapping[str, str]) -> str:
        """What follows, with the variables' values; one that is not set is empty."""
        return filled(self.rest, variables)

    @property
    def words(self) -> list[str]:
        """The exec form."""
        found: list[str] = json.loads(self.rest.removeprefix("CMD "))
        return found


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, word: str) -> Instruction:
        """The one that counts of those that replace each other."""
        return [one for one in self.instructions if one.word == word][-1]


def filled(text: str, variables: Mapping[str, str]) -> str:
    """Put values in the place of `$NAME` and `${NAME}`."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), text)


def instructions(path: Path) -> Iterator[Instruction]:
    """Yield a file's instructions."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, rest = line.split(None, 1)
            flags = {}
            while found := re.match(r"--([\w-]+)=(\S+)\s+", rest):
                flags[found[1]], rest = found[2], rest[found.end() :]
            yield Instruction(word, flags, rest)


def stages(path: Path, arguments: Mapping[str, str] | None = None) -> list[Stage]:
    """Divide a file; `arguments` are given to the ARGs that stand before the first FROM."""
    made: list[Stage] = []
    given: dict[str, str] = {}
    for one in instructions(path):
        if one.word == "FROM":
            base, *alias = filled(one.rest, given).split()
            made.append(Stage(base, alias[1] if alias else str(len(made))))
        elif made:
            made[-1].instructions.append(one)
        else:
            name, _, value = one.rest.partition("=")
            given[name] = (arguments or {}).get(name, value)
    return made


def pairs(text: str) -> dict[str, str]:
    """What ENV, LABEL and ARG set."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def context(root: Path) -> Callable[[Path], bool]:
    """Whether a path below `root` is sent to the builder, as `.dockerignore` says: the last line that fits decides."""
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]

    def is_sent(path: Path) -> bool:
        relative = PurePosixPath(path.relative_to(root))
        names = [str(one) for one in (relative, *relative.parents) if one.name]
        sent = True
        for line in lines:
            pattern = line.removeprefix("!").removeprefix("**/")
            if pattern != "*" and re.search(r"[*?\[]", pattern):
                raise ValueError(f"{line!r} is not understood here")
            tried = [name.rpartition("/")[2] for name in names] if line.startswith("**/") else names
            if pattern == "*" or pattern in tried:
                sent = line.startswith("!")
        return sent

    return is_sent
