"""What a full server has no room for: refused by its headers, before anything else is made of it."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from promptd.api.auth import check_local
from promptd.api.error_handlers import error_response
from promptd.api.routes import ROUTES
from promptd.api.services import Services
from promptd.api.trail import trail_in
from promptd.errors import OverloadedError, PermissionDeniedError

CROWDED = "promptd.too_many_connections"
"""Where a request's `scope["state"]` tells that its connection is one too many, where the HTTP server counts them."""
_ROUTES = {route.path: route for route in ROUTES if route.is_inference and "{" not in route.path}
_PROBES = frozenset(route.path for route in ROUTES if route.tag == "health")


class Shedding:
    """ASGI middleware: says no where the guard of the route would, without the framework's layers in between.

    A flood has as many requests as anybody likes, and what each of them costs is taken from those that are served. Only
    what needs neither a wait nor the body is looked at here. Whatever is in doubt passes on to the guard: a key that
    has to be looked up, or is none; a route that has to be searched for; a server that leaves.
    """

    def __init__(self, app: ASGIApp, state: Any) -> None:
        """`state` is the application's, with its `services`."""
        self._app = app
        self._state = state

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            trail_in(scope).is_shed = True
            ending = {"Connection": "close"} if _is_crowded(scope) else {}
            await error_response(refusal, scope, ending)(scope, receive, send)

    def _refusal(self, scope: AsgiScope) -> OverloadedError | None:
        """Return what the guard would raise, where that is certain, or that there are too many connections."""
        if _is_crowded(scope) and scope["path"] not in _PROBES:
            return OverloadedError("the server has as many connections open as it can have")
        route = _ROUTES.get(scope["path"])
        if route is None or scope["method"] != route.method:
            return None
        services: Services = self._state.services
        budget = services.gate.budgets.requests
        if budget.has_room_for_all or services.is_draining:
            return None
        headers = Headers(scope=scope)
        if services.keys.is_open:
            try:
                check_local(headers.get("host"), headers.get("origin"))
            except PermissionDeniedError:
                return None
        principal = services.keys.known(headers.get("authorization"))
        if principal is None or not principal.scopes.issuperset(route.scopes):
            return None
        if budget.has_room(principal.tenant, 1):
            return None
        trail = trail_in(scope)
        trail.operation, trail.tenant = route.operation, principal.tenant
        scope["route"] = route  # what counts requests asks for it
        return budget.refusal()


def _is_crowded(scope: AsgiScope) -> bool:
    return bool(scope.get("state", {}).get(CROWDED))
