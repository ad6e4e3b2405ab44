"""`promptd serve` as a user starts it, in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.patience import until
from tests.ports import NO_CERTIFICATES, free_port

START_SECONDS = 180
"""Loading takes a few seconds, on a busy machine many."""


def is_ready(address: str) -> bool:
    """Whether a server says that it takes requests."""
    try:
        return httpx.get(f"{address}/readyz", verify=NO_CERTIFICATES).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def demo_server(folder: Path) -> Iterator[str]:
    """Serve the demo on a free port and a fresh store; yield the address; SIGTERM stops it with exit code 0."""
    port = free_port()
    command = [sys.executable, "-m", "promptd", "serve", "--port", str(port), "--store", str(folder / "store")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or is_ready(address), seconds=START_SECONDS, pause_seconds=0.05)
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
