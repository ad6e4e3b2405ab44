"""The test's end of `crash_worker`: orders go down, what the workers say comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Message = dict[str, Any]


class Forge:
    """Starts workers in a few milliseconds each."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.store.crash_worker"]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, bufsize=1
        )

    def order(self, **order: Any) -> None:
        """Have one worker do something."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order) + "\n")

    def hear(self) -> Message:
        """Wait for the next thing that a worker says."""
        assert self._parent.stdout is not None
        message: Message = json.loads(self._parent.stdout.readline())
        return message

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
        """End: the parent leaves when there are no more orders."""
        self._parent.communicate(timeout=20)
