"""What is freed is used again as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from promptd.modeling import freed_memory

PROGRAM = """
import resource, runpy, sys
module = runpy.run_path(sys.argv[1])
if sys.argv[2] == "kept" and not module["keep_freed_memory"]():
    sys.exit("this C library cannot")
for number in range(8):
    if number == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [b"x" * (16 << 20) for _ in range(4)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that a process is given for the last four of eight times that it takes and frees 64 MiB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("page faults are counted on Linux")
    command = [sys.executable, "-c", PROGRAM, freed_memory.__file__, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "cannot" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    """Hardly a page is asked for again; the control is the C library as it is, which gives memory back each time."""
    assert 5 * faults("kept") < faults("given back")
