"""Server-sent events in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from promptd.api.error_handlers import envelope
from promptd.api.wire import WIRE
from promptd.errors import PromptdError
from promptd.json_line import one_line

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: object) -> str:
    """Serialise one value without spaces."""
    return "null" if value is None else _encode(value)  # of the encoder a null costs as much as an object


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
    return f"data: {one_line(data)}\n\n".encode()


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
