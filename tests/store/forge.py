"""The test's end of `crash_worker`: orders go down, what the workers say comes back."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
Message = dict[str, Any]


class Forge:
    """Starts workers in a few milliseconds each."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.store.crash_worker"]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, bufsize=1
        )
        self._said: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def order(self, **order: Any) -> None:
        """Have one worker do something."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order) + "\n")

    def hear(self) -> Message:
        """Wait for the next thing that a worker says; raises `queue.Empty` where they say nothing for long."""
        message: Message = json.loads(self._said.get(timeout=PATIENCE_SECONDS))
        return message

    def _listen(self) -> None:
        assert self._parent.stdout is not None
        for line in self._parent.stdout:
            self._said.put(line)

    def write_and_kill(
        self, folder: Path, seed: int, *, num_acks: int, delay_seconds: float, do: str = "write"
    ) -> list[Message]:
        """Run two writers at once, kill each some time after its `num_acks`-th promise, return all promises."""
        for index in range(2):
            self.order(do=do, folder=str(folder), seed=2 * seed + index)
        acks: dict[int, list[Message]] = {}
        while len(acks) < 2 or min(map(len, acks.values())) < num_acks:
            message = self.hear()
            if message["op"] == "started":
                acks[message["pid"]] = []
            else:
                acks[message["pid"]].append(message)
        for pid in acks:
            time.sleep(delay_seconds)
            os.kill(pid, signal.SIGKILL)
            self.order(do="wait", pid=pid)
        ended = 0
        while ended < 2:
            message = self.hear()
            if message["op"] == "ended":
                ended += 1
            else:
                acks[message["pid"]].append(message)
        return [message for said in acks.values() for message in said]

    def close(self) -> None:
        """End: the parent leaves when there are no more orders, and the reader when no worker is left."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        assert not self._reader.is_alive()
        self._parent.stdout.close()
