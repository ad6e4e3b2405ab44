"""The child's end of the pipe: one JSON line asks, one answers. Standard library alone: it runs in peers' environments.

An engine is one of two things. `Stepping` takes a request at any moment and says after each step which tokens came.
`Batching` takes some requests and gives all answers when all are done.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

Request = dict[str, Any]
"""`ids` (token ids), `max_tokens`, `prompt` (a name, or null), `at` (seconds after the beginning)."""


class Stepping(Protocol):
    """Continuous batching."""

    def add(self, number: int, request: Request) -> None:
        """Take a request."""

    def step(self) -> list[tuple[int, list[int]]]:
        """Return the new tokens, by the request's number."""


class Batching(Protocol):
    """Static batches."""

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer all, at once."""


def drive(engine: Stepping, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    """Send each request when its time has come and fewer than `concurrency` are under way.

    Returns `seconds`, `answers`, and for every token its seconds after the moment its request was due.
    """
    due = deque(sorted(range(len(requests)), key=lambda number: requests[number]["at"]))
    answers: list[list[int]] = [[] for _ in requests]
    times: list[list[float]] = [[] for _ in requests]
    num_running, began = 0, time.perf_counter()
    while due or num_running:
        now = time.perf_counter() - began
        while due and num_running < concurrency and requests[due[0]]["at"] <= now:
            number = due.popleft()
            engine.add(number, requests[number])
            num_running += 1
        if not num_running:
            time.sleep(max(0.0, requests[due[0]]["at"] - now))
            continue
        for number, ids in engine.step():
            arrived = time.perf_counter() - began - requests[number]["at"]
            answers[number] += ids
            times[number] += [arrived] * len(ids)
            num_running -= len(answers[number]) == requests[number]["max_tokens"]
    return {"seconds": time.perf_counter() - began, "answers": answers, "times": times}


def in_batches(engine: Batching, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    """Answer `concurrency` requests at a time; arrival times cannot be honoured."""
    answers: list[list[int]] = []
    began = time.perf_counter()
    for start in range(0, len(requests), concurrency):
        answers += engine.generate(requests[start : start + concurrency])
    return {"seconds": time.perf_counter() - began, "answers": answers, "times": None}


def serve(commands: dict[str, Callable[..., Any]]) -> None:
    """Answer lines until the input ends. `commands` are called with the line's other fields."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print must not come between the answers
        _serve(commands, sys.stdin, out)


def _serve(commands: dict[str, Callable[..., Any]], lines: TextIO, out: TextIO) -> None:
    for line in lines:
        asked = json.loads(line)
        try:
            answer = {"answer": commands[asked.pop("do")](**asked)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


class Worker:
    """What every worker answers: `load`, `prompts`, `run`. `make(model, threads)` returns its engine."""

    def __init__(self, make: Callable[[str, int], Any]) -> None:
        self._make = make
        self._engine: Any = None

    def load(self, model: str, threads: int) -> None:
        """Load the model, and answer one token, so that nothing is left for later."""
        self._engine = self._make(model, threads)
        self.run([{"ids": [5, 6, 7], "max_tokens": 1, "prompt": None, "at": 0.0}], 1)

    def prompts(self, files: dict[str, str]) -> None:
        """Take learned prompts: safetensors files by name."""
        self._engine.take_prompts(files)

    def run(self, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
        """Answer requests."""
        if hasattr(self._engine, "step"):
            return drive(self._engine, requests, concurrency)
        return in_batches(self._engine, requests, concurrency)

    def serve(self) -> None:
        """Answer until the input ends."""
        serve({"load": self.load, "prompts": self.prompts, "run": self.run})
