"""What hangs beyond pytest-timeout's reach ends the run, and the report tells where it hung."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOP = """
    async def stubborn():
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass
    asyncio.run(stubborn())
"""
THREAD = """
    threading.Thread(target=threading.Event().wait).start()
"""


def run(
    folder: Path, test: str, *others: str, timeout: float = 0.5, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run tests in a process of their own, half a second for each and half a second beyond."""
    header = "import asyncio, threading, time\nfrom tests import watchdog\nwatchdog.GRACE_SECONDS = 0.5\n"
    for number, one in enumerate([test, *others]):
        (folder / f"test_{number}.py").write_text(f"{header}def test_it():{one}")
    command = [sys.executable, "-m", "pytest", "-p", "pytest_timeout", "-p", "tests.watchdog"]
    command += ["-o", f"timeout={timeout}", *options, "-c", "/dev/null", "--rootdir", str(folder), str(folder)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("test", "place"), [(LOOP, "_cancel_all_tasks"), (THREAD, "_shutdown")], ids=["loop", "thread"]
)
def test_a_run_that_hangs_ends(tmp_path: Path, test: str, place: str) -> None:
    """An event loop that waits for a task which will not end, and a thread that is left at the end."""
    done = run(tmp_path, test)
    assert done.returncode == 1 and "Timeout (0:00:0" in done.stderr and place in done.stderr, done


def test_a_run_that_ends_is_not_touched(tmp_path: Path) -> None:
    """The control: a failure stays what it is, and nothing is told of threads."""
    done = run(tmp_path, "assert False")
    assert done.returncode == 1 and "1 failed" in done.stdout and "Timeout" not in done.stderr, done


def test_a_worker_may_wait_for_another(tmp_path: Path) -> None:
    """One that has no test left, for longer than the grace."""
    done = run(tmp_path, "pass", "time.sleep(3)", timeout=60, options=["-p", "xdist", "-n2", "--dist=loadfile"])
    assert done.returncode == 0 and "2 passed" in done.stdout and "Timeout" not in done.stderr, done
