"""Clients that stop sending or reading: they hold what they hold for a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import Message, Receive, Scope, Send

from promptd.errors import SlowClientError

ABORT = "promptd.abort_connection"
"""Where a request's `scope["state"]` keeps what cuts its connection, where the HTTP server can."""
Passing = Callable[[Receive, Send], Awaitable[None]]


class _StalledReaderError(Exception):
    """Nobody reads the answer; there is no way left to say so."""


async def without_stalls(scope: Scope, receive: Receive, send: Send, pass_on: Passing, seconds: float) -> None:
    """Answer a request whose client keeps moving; else end the request, and the connection where it has to be.

    A body of which nothing comes raises `SlowClientError` in whoever reads it.
    """
    is_reading = True

    async def receive_in_time() -> Message:
        nonlocal is_reading
        if not is_reading:  # now it tells when the client leaves, which may be never
            return await receive()
        try:
            async with asyncio.timeout(seconds):
                message = await receive()
        except TimeoutError:
            raise SlowClientError(f"nothing of the body came for {seconds:g} seconds", param="body") from None
        is_reading = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            raise _StalledReaderError from None

    try:
        await pass_on(receive_in_time, send_in_time)
    except _StalledReaderError:
        cut = scope.get("state", {}).get(ABORT)
        if cut is not None:  # closing would wait for the client to read on
            cut()
            await asyncio.sleep(0)  # the HTTP server hears of it
