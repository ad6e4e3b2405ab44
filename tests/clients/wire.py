"""A made-up server of a few lines: it answers what it is told, and remembers what it was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "alice@sha256:00",
    "choices": [{"index": 0, "text": " world", "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
}
PROMPT = {
    "id": "alice",
    "object": "prompt",
    "owned_by": "default",
    "version": "sha256:00",
    "number": 3,
    "kind": "soft",
    "num_virtual_tokens": 8,
    "num_bytes": 1000,
    "created": 1,
}

Answer = Exception | Callable[[], httpx.Response]
"""What one request meets; a response is made anew each time, since a client consumes it."""


def reply(body: Any, status: int = 200, **headers: str) -> Answer:
    """Answer with JSON."""
    return lambda: httpx.Response(status, json=body, headers=headers)


def error(status: int, code: str, **headers: str) -> Answer:
    """Answer with the error envelope."""
    body = {"error": {"message": f"it is {code}", "type": "server_error", "param": None, "code": code}}
    return reply(body, status, **headers)


def events(*data: Any, ends: bool = True) -> Answer:
    """Answer with a stream."""
    text = "".join(_lines(*data)) + "data: [DONE]\n\n" * ends
    return lambda: httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


def cut_events(*data: Any) -> Answer:
    """Answer with a stream whose connection breaks after these events."""
    return lambda: httpx.Response(200, stream=Cut("".join(_lines(*data)).encode()))


def _lines(*data: Any) -> list[str]:
    return [f"data: {json.dumps(one)}\n\n" for one in data]


class Script(httpx.MockTransport):
    """Gives its answers in turn, the last one again and again."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.requests: list[httpx.Request] = []
        self._answers = list(answers)
        super().__init__(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer()


class Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose connection breaks after its first part."""

    def __init__(self, first: bytes) -> None:
        self._first = first

    def __iter__(self) -> Iterator[bytes]:
        yield self._first
        raise httpx.ReadError("connection reset")

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        """The same, asynchronously."""
        yield self._first
        raise httpx.ReadError("connection reset")
