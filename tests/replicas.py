"""Servers as real processes over one Redis: started in a second each, to be restarted, stopped and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.patience import PATIENCE_SECONDS, until
from tests.ports import NO_CERTIFICATES, free_port

ROOT = Path(__file__).parents[1]
START_SECONDS = 120
END_SECONDS = 120


class ReplicaForge:
    """The test's end of `replica_forge`."""

    def __init__(self, model: Path, root: Path = ROOT) -> None:
        """`root` is where the release lies whose servers are wanted."""
        self.model = model
        command = [sys.executable, "-m", "tests.replica_forge"]
        paths = [root, *(root / name for name in ("server", "prompt_store", "clients/python"))]
        self._parent = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
            text=True,
            bufsize=1,
        )
        self.ask(load=str(model))

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and read its answer."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        answer: dict[str, Any] = json.loads(self._parent.stdout.readline())
        return answer

    def close(self) -> None:
        """End: the parent leaves when there are no more orders."""
        self._parent.communicate(timeout=20)


class Replica:
    """One server, or with `worker` one `promptd worker`; its port stays the same over restarts."""

    def __init__(
        self,
        forge: ReplicaForge,
        folder: Path,
        store: str,
        *,
        worker: bool = False,
        traits: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """`traits` are the forge's: what this process does otherwise than the product."""
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}.log"
        self._traits = {"worker": worker, **(traits or {})}
        self._forge = forge
        self._settings = {"model": str(forge.model), "store": store, "port": self.port, "training": "off", **settings}
        self.pid: int | None = None

    def start(self) -> Replica:
        """Start it."""
        order = {"settings": self._settings, "log": str(self.log), **self._traits}
        self.pid = self._forge.ask(**order)["pid"]
        return self

    def until_ready(self) -> Replica:
        """Wait until it says that new requests are welcome; of one that does not come it is told where it hangs."""
        try:
            until(lambda: self.status == 200, self, seconds=START_SECONDS, pause_seconds=0.02)
        except AssertionError:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGUSR2)  # `replica_forge.STACKS`
                time.sleep(2)
            raise AssertionError(self) from None
        return self

    @property
    def status(self) -> int | None:
        """What it says of its readiness; None where it does not listen."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=PATIENCE_SECONDS, verify=NO_CERTIFICATES).status_code
        except httpx.TransportError:
            return None

    def __repr__(self) -> str:
        return f"a server that wrote: {self.log.read_text()[-5000:]}"

    def signal(self, how: signal.Signals) -> None:
        """Send a signal."""
        assert self.pid is not None
        os.kill(self.pid, how)

    def wait(self) -> int:
        """Wait for its end and return the exit status; negative: the signal."""
        status: int | None = self._forge.ask(wait=self.pid, seconds=END_SECONDS)["status"]
        assert status is not None, f"it runs on after {END_SECONDS} s: {self.log.read_text()[-2000:]}"
        self.pid = None
        return status

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        self.wait()

    def revive(self) -> None:
        """See to it that it is ready, whatever has become of it."""
        if self.status != 200:
            self.close()
            self.start().until_ready()

    def close(self) -> None:
        """End it if it runs."""
        if self.pid is not None:
            self.signal(signal.SIGCONT)
            self.kill()


@contextlib.contextmanager
def running_replicas(
    forge: ReplicaForge, folder: Path, store: str, count: int = 2, **settings: Any
) -> Iterator[list[Replica]]:
    """So many ready servers for a block."""
    replicas = [Replica(forge, folder, store, **settings) for _ in range(count)]
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.until_ready()
        yield replicas
    finally:
        for replica in replicas:
            replica.close()
