"""A terminal for one page: one bash, so that what a command exports or starts is there for the next."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from tests.patience import PATIENCE_SECONDS

LIMIT_SECONDS = 900.0
"""A command that takes longer hangs, also on a slow machine."""


class Terminal:
    """Commands one after the other, their standard output and errors together."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """Start in a folder, with `promptd` and `python` of this test's own Python first in the PATH."""
        tools = folder / ".tools"
        tools.mkdir()
        for name, command in {"promptd": "-m promptd.cli", "python": ""}.items():
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
            (tools / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PROMPTD_")}
        path = f"{tools}:{os.environ['PATH']}"
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={**kept, "HOME": str(folder), "COLUMNS": "120", "NO_COLOR": "1", **environment, "PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._signal(signal.SIGTERM)  # the whole session: also what a page left in the background
        try:
            self._bash.communicate(timeout=PATIENCE_SECONDS)  # until the last of them is gone
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._bash.communicate(timeout=PATIENCE_SECONDS)
            raise

    def run(self, command: str) -> tuple[str, int]:
        """Run a command; return what it printed and its exit status."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        mark = f"end-{secrets.token_hex(8)}"
        self._bash.stdin.write(f"{{ {command}\n}} </dev/null\nprintf '\\n{mark} %d\\n' $?\n".encode())
        self._bash.stdin.flush()
        watchdog = threading.Timer(LIMIT_SECONDS, self._signal, [signal.SIGKILL])
        watchdog.start()
        try:
            lines: list[str] = []
            for raw in self._bash.stdout:
                line = raw.decode(errors="replace")
                if line.startswith(mark):
                    return "".join(lines).removesuffix("\n"), int(line.split()[1])
                lines.append(line)
        finally:
            watchdog.cancel()
        raise AssertionError(f"the terminal ended during {command!r}:\n{''.join(lines)}")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, number)
