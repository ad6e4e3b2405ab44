"""The way from an answer of many parts to the HTTP server, past everything that looks at its beginning alone."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

WIRE = "promptd.wire"
"""Where a request's scope keeps the HTTP server's own `send`.

Whoever sends a body there has sent the answer's beginning through all middleware.
"""


class KeepWire:
    """ASGI middleware, the outermost: notes the HTTP server's `send`.

    Every layer wraps it to see how an answer begins, and would pass on each of ten thousand events behind that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        scope[WIRE] = send
        await self._app(scope, receive, send)
