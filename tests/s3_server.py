"""A real server that speaks S3, on loopback: moto, which is not ours. It keeps everything in memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.patience import until
from tests.ports import NO_CERTIFICATES, free_port

START_SECONDS = 120


@dataclass(frozen=True)
class S3Server:
    """A running one, which takes every key."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """What leads a client of S3 there."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        httpx.put(f"{self.url}/{name}", timeout=60, verify=NO_CERTIFICATES).raise_for_status()

    def pause(self) -> None:
        """Stop answering; connections stand."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """Run one for a block; the test is skipped where moto or s3fs is not installed."""
    for module in ("moto", "flask", "s3fs"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'promptd[s3-tests]'")
    port = free_port()
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    made = S3Server(f"http://127.0.0.1:{port}", process)

    def answers() -> bool:
        assert process.poll() is None, (folder / "s3.log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(made.url, timeout=START_SECONDS, verify=NO_CERTIFICATES).is_success
        return False

    try:
        until(answers, "the S3 server answers", seconds=START_SECONDS, pause_seconds=0.05)
        yield made
    finally:
        process.kill()
        process.wait(60)
