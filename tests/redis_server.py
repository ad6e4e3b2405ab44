"""A real redis-server of a test's own on loopback: started, stopped, killed and started again on the same data."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

SAFE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}


def program(name: str) -> str:
    """Where a server program of Debian's is; the test is skipped where it is not installed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed and ./tests/run could not install it: apt-get install {name}")
    return found


class RedisServer:
    """One redis-server process over one folder; the port stays the same over restarts."""

    def __init__(self, folder: Path, *, port: int | None = None, program_name: str = "redis-server", **config: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self._program = program(program_name)
        self._config = {**SAFE, **{name.replace("_", "-"): value for name, value in config.items()}}
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """For `--store`."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it answers."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), "save": "", **self._config}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen([self._program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.settimeout(1)
                connection.sendall(b"PING\r\n")
                if connection.recv(64)[:5] in (b"+PONG", b"-NOAU"):
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise RuntimeError(f"redis-server does not answer on port {self.port}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it, by default at once and without a chance to write anything."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None

    def pause(self) -> None:
        """Stop it where it is: connections stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, stopped or not."""
        if self.process is not None:
            self.resume()
            self.kill()


@contextlib.contextmanager
def running_redis(folder: Path, **config: str) -> Iterator[RedisServer]:
    """A server for a block."""
    server = RedisServer(folder, **config)
    try:
        yield server
    finally:
        server.close()
