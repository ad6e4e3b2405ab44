"""`promptd serve` as a user starts it, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.patience import until
from tests.ports import NO_CERTIFICATES

START_SECONDS = 180
"""Loading takes a few seconds, on a busy machine many."""
READY = re.compile(r"ready \S+ at (http://\S+),")


def is_ready(address: str) -> bool:
    """Whether a server says that it takes requests."""
    try:
        return httpx.get(f"{address}/readyz", verify=NO_CERTIFICATES).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def demo_server(folder: Path) -> Iterator[str]:
    """Serve the demo over a fresh store, on the port that it says itself; SIGTERM stops it with exit code 0."""
    command = [sys.executable, "-m", "promptd", "serve", "--port", "0", "--store", str(folder / "store")]
    environment = {**os.environ, "PROMPTD_LEAVE_SECONDS": "0"}  # no balancer is to hear that it goes
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        until(
            lambda: READY.search(log.read_text()) or process.poll() is not None,
            seconds=START_SECONDS,
            pause_seconds=0.05,
        )
        ready = READY.search(log.read_text())
        assert ready is not None, log.read_text()
        yield ready[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
