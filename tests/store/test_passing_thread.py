"""Tensor work beside the model leaves no team of OpenMP workers behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from promptd_store.passing_thread import compute, in_passing_thread

COUNT = """
import os, time, torch
from promptd_store.passing_thread import in_passing_thread

def workers_left_by(run, work):
    before = len(os.listdir("/proc/self/task"))
    run(work)
    until = time.monotonic() + 10  # the system takes a moment to take threads away
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < until and run is in_passing_thread:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(3)
work = lambda: torch.ones(1_000_000).exp()
print(workers_left_by(in_passing_thread, work), workers_left_by(lambda work: work(), work))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of a process in /proc")
def test_no_team_stays_behind() -> None:
    """None after a passing thread; the control, the same work in the caller's thread, leaves two workers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "2"], done.stderr


def test_results_and_errors_come_back() -> None:
    """What the work returns and what it raises reaches whoever waits."""
    assert in_passing_thread(divmod, 7, 2) == (3, 1)
    assert asyncio.run(compute(sorted, [2, 1], reverse=True)) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(compute(divmod, 7, 0))
