"""Server-sent events in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event

from promptd.api.error_handlers import envelope
from promptd.errors import PromptdError

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event_stream(chunks: AsyncIterator[Mapping[str, Any]]) -> StreamingResponse:
    """Send chunks as `data:` events and `[DONE]` at the end; an error becomes the last event."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield format_sse_event(data_str=json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))
        except PromptdError as error:
            yield format_sse_event(data_str=json.dumps(envelope(error)))
            return
        yield format_sse_event(data_str="[DONE]")

    return EventSourceResponse(events(), headers=_HEADERS)
