"""Server-sent events in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from promptd.api.error_handlers import envelope
from promptd.api.wire import WIRE
from promptd.errors import PromptdError

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Serialise one value without spaces."""


def event_stream(
    batches: AsyncGenerator[Iterable[str], None], on_end: Callable[[], None] = lambda: None
) -> StreamingResponse:
    """Send JSON texts as `data:` events and `[DONE]` at the end; an error becomes the last event.

    The texts of a batch leave together. `on_end` is called whatever happens, also where nothing was asked of `batches`.
    """

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(batches):
                async for batch in batches:
                    yield b"".join(map(_event, batch))
        except PromptdError as error:
            yield _event(json.dumps(envelope(error)))
            return
        yield _event("[DONE]")

    return _EventStream(events(), on_end)


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()  # JSON has no line breaks of its own


class _EventStream(EventSourceResponse):
    """Begins as every answer does; then each event costs one call of the HTTP server."""

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers=_HEADERS)
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        self._wire: Send = scope.get(WIRE, send)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()

    async def stream_response(self, send: Send) -> None:
        """Send the headers, and the events as they come."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            async for event in self._events:
                await self._wire({"type": "http.response.body", "body": event, "more_body": True})
        await self._wire({"type": "http.response.body", "body": b"", "more_body": False})


def id_list(token_ids: Iterable[int]) -> str:
    """Serialise token ids."""
    return f"[{','.join(map(str, token_ids))}]"


class ChunkFrame:
    """What all chunks of a stream have in common, serialised once."""

    def __init__(self, header: Mapping[str, Any], *, with_usage: bool) -> None:
        self._front = to_json(header)[:-1] + ',"choices":['
        self._end = '],"usage":null}' if with_usage else "]}"

    def around(self, choice: str) -> str:
        """Return the chunk of one choice, which is JSON already."""
        return f"{self._front}{choice}{self._end}"

    def with_usage(self, usage: Mapping[str, Any]) -> str:
        """Return the last chunk, which has no choice."""
        return f'{self._front}],"usage":{to_json(usage)}}}'
