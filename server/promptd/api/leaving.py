"""A server on its way out of its load balancer: not ready any more, and every request is still served."""

from __future__ import annotations

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptd.errors import ConflictError


class Leaving:
    """Whether load balancers are told no, and since when."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._is_final = False

    @property
    def has_begun(self) -> bool:
        """Whether they are told no."""
        return self._since is not None

    @property
    def seconds(self) -> float | None:
        """For how long they have been told no; None where they are told yes."""
        return None if self._since is None else time.monotonic() - self._since

    def begin(self) -> None:
        """Say no from now on."""
        if self._since is None:
            self._since = time.monotonic()

    def take_back(self) -> None:
        """Say yes again; raises `ConflictError` where the process ends."""
        if self._is_final:
            raise ConflictError("the server is shutting down", code="shutting_down")
        self._since = None

    def end(self, leave_seconds: float) -> float:
        """Say no for good, and return how long to serve on: less where it was drained before."""
        self.begin()
        self._is_final = True
        return max(0.0, leave_seconds - (self.seconds or 0.0))


class CloseWhenLeaving:
    """ASGI middleware: answers of a leaving server end their connections, so that the next request goes elsewhere."""

    def __init__(self, app: ASGIApp, state: Any) -> None:
        """`state` is the application's; its `services` know when the server leaves."""
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._state.services.leaving.has_begun:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_closing if scope["type"] == "http" else send)
