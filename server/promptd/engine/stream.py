"""The outputs of one request on their way to its reader, on the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from promptd.engine.request import Output, RequestOutput

MAX_UNREAD = 256
"""Outputs of one request that may wait for their reader."""
MAX_UNREAD_SECONDS = 1.0
"""More may wait for so long: the event loop may have been late, and not the reader."""


class Stream:
    """Outputs of one request, as they come. A typed error is raised by the iteration that meets it.

    A reader that does not keep up ends its request: what waits for it is bounded.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.arrived = asyncio.Event()
        """Set by outputs and by the end; one who reads several streams may give them one event."""
        self.num_to_wake = 1
        """So many outputs that wait set it."""
        self._outputs: deque[Output] = deque()
        self._abort = abort
        self.is_done = False
        """Whether nothing more comes of it."""
        self._waiting_since = 0.0
        self.timer: asyncio.TimerHandle | None = None
        """Rings when a deadline has passed."""

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        output = await self.next_output()
        if output is None:
            raise StopAsyncIteration
        return output  # type: ignore[return-value]

    async def next_output(self) -> Output | None:
        """Wait for the next output; None after the last. Aborts the request when the waiting task is cancelled."""
        if self.is_done:
            return None
        try:
            while not self._outputs:
                if self.is_done:  # aborted by another task meanwhile
                    return None
                self.arrived.clear()
                await self.arrived.wait()
        except asyncio.CancelledError:
            self.abort()
            raise
        output = self._outputs.popleft()
        self._waiting_since = time.monotonic()
        self.is_done = output.is_last
        if output.error is not None:
            raise output.error
        return output

    def take(self) -> list[Output]:
        """Take what waits, without waiting; an error is the last of them, and is not raised."""
        if self.is_done or not self._outputs:
            return []
        taken = list(self._outputs)
        self._outputs.clear()
        self.is_done = taken[-1].is_last
        return taken

    def abort(self) -> None:
        """End the request; nothing more comes. Harmless when it is done already."""
        if not self.is_done:
            self.close()
            self._abort(self.request_id)

    def close(self) -> None:
        """Let whoever waits for outputs find the end."""
        self.is_done = True
        self.arrived.set()

    def deliver(self, output: Output) -> None:
        """Add an output; on the event loop's thread."""
        if not self._outputs:
            self._waiting_since = time.monotonic()
        self._outputs.append(output)
        if output.is_last or len(self._outputs) >= self.num_to_wake:
            self.arrived.set()

    @property
    def is_overrun(self) -> bool:
        """Whether too many outputs wait, and have waited too long, for their reader."""
        return len(self._outputs) >= MAX_UNREAD and time.monotonic() - self._waiting_since > MAX_UNREAD_SECONDS
