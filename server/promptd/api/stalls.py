"""Clients that stop sending or reading: they hold what they hold for a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from starlette.types import Message, Receive, Scope, Send

from promptd.api.wire import WIRE
from promptd.errors import SlowClientError

ABORT = "promptd.abort_connection"
"""Where a request's `scope["state"]` keeps what cuts its connection, where the HTTP server can."""
Passing = Callable[[Receive, Send], Awaitable[None]]


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

    clock = _StallClock(seconds)
    if WIRE in scope:
        scope[WIRE] = clock.timed(scope[WIRE])
    try:
        async with clock:
            await pass_on(receive_in_time, clock.timed(send))
    except TimeoutError:
        if not clock.has_rung:
            raise
        cut = scope.get("state", {}).get(ABORT)
        if cut is not None:  # closing would wait for the client to read on
            cut()
            await asyncio.sleep(0)  # the HTTP server hears of it


class _StallClock:
    """Ends a block with `TimeoutError` where one message takes too long to send.

    It has one timer for them all: a stream sends thousands, and hardly one ever waits.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._block = asyncio.timeout(None)
        self._sending_since: float | None = None

    async def __aenter__(self) -> None:
        await self._block.__aenter__()
        self._timer = self._loop.call_later(self._seconds, self._look)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._block.__aexit__(kind, error, trace)

    @property
    def has_rung(self) -> bool:
        """Whether it was this clock that ended the block."""
        return self._block.expired()

    def timed(self, send: Send) -> Send:
        """Return `send` with this clock beside it."""

        async def send_in_time(message: Message) -> None:
            self._sending_since = self._loop.time()
            try:
                await send(message)
            finally:
                self._sending_since = None

        return send_in_time

    def _look(self) -> None:
        """Ring, or come back when what is being sent now would be late."""
        now = self._loop.time()
        due = self._seconds + (now if self._sending_since is None else self._sending_since)
        if due <= now:
            self._block.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)
