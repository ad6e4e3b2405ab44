"""Files on their way out: in pieces, so that a reader who dawdles holds one of them here, and not the whole file."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from fastapi.responses import StreamingResponse
from promptd_store import Content

PIECE_BYTES = 64 << 10


def download(content: Content, media_type: str, headers: Mapping[str, str] | None = None) -> StreamingResponse:
    """Answer with a file; its length is told."""
    view = memoryview(content)

    async def pieces() -> AsyncGenerator[bytes, None]:
        for at in range(0, len(view), PIECE_BYTES):
            yield bytes(view[at : at + PIECE_BYTES])

    told = {**(headers or {}), "Content-Length": str(len(view))}
    return StreamingResponse(pieces(), media_type=media_type, headers=told)
