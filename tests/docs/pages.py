"""A page's blocks: what is run, what it should print, and what is not run and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs.compare import Shown

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "server" / "docs"
RUN_LANGUAGES = ("console", "python")
"""A terminal with `$ ` in front of commands, and Python. Whatever else is fenced (text, yaml) is not run."""

_FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_VARY = re.compile(r"<!-- numbers vary -->\n$")
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>(?:(?!-->).)+) -->\n$", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a terminal, and what stands below it."""

    text: str
    shown: Shown


@dataclass(frozen=True)
class Block:
    """One fenced block. A comment `<!-- not run: why -->` in the line before it keeps it from being run."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    numbers_vary: bool
    """A comment before the block says that any number may stand for any: what was trained differs by machine."""
    shown: Shown
    """A Python block's output: the `text` block right below it, where there is one."""

    @property
    def place(self) -> str:
        """As compilers name it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[Command]:
        """Split a terminal: `$ ` begins a command, `> ` or a backslash before it goes on with it."""
        command, output = "", list[str]()
        for line in self.text.splitlines():
            if line.startswith("$ "):
                if command:
                    yield Command(command, Shown("\n".join(output), self.numbers_vary))
                command, output = line[2:], []
            elif command and not output and (line.startswith("> ") or command.endswith("\\")):
                command += "\n" + line.removeprefix("> ")
            else:
                output.append(line)
        if not command:
            raise ValueError(f"{self.place}: a console block without `$ `")
        yield Command(command, Shown("\n".join(output), self.numbers_vary))


def pages() -> list[Path]:
    """README and every page of server/docs."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page that could run, in order."""
    text = page.read_text()
    fences = list(_FENCE.finditer(text))
    blocks = []
    for fence, following in zip(fences, [*fences, None][1:], strict=True):
        if fence["language"] not in RUN_LANGUAGES:
            continue
        reason = _NOT_RUN.search(text, 0, fence.start())
        is_output = following is not None and following["language"] == "text"
        is_output = is_output and not text[fence.end() : following.start()].strip()  # type: ignore[union-attr]
        shown = following["text"] if is_output and fence["language"] == "python" else ""  # type: ignore[index]
        line = text.count("\n", 0, fence.start()) + 1
        why = None if reason is None else " ".join(reason["reason"].split())
        vary = _VARY.search(text, 0, fence.start()) is not None
        blocks.append(Block(page, line, fence["language"], fence["text"], why, vary, Shown(shown, vary)))
    return blocks
