"""What a server that is about to leave tells its clients."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CloseWhenLeaving:
    """ASGI middleware: answers of a leaving server end their connections, so that the next request goes elsewhere."""

    def __init__(self, app: ASGIApp, state: Any) -> None:
        """`state` is the application's; its `services` know when the server leaves."""
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._state.services.is_leaving:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_closing if scope["type"] == "http" else send)
