"""What a full server has no room for: refused by its head, before anything is made of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from promptd.api.auth import check_local
from promptd.api.error_handlers import error_response
from promptd.api.heads import Head
from promptd.api.routes import ROUTES
from promptd.api.services import Services, request_id
from promptd.errors import OverloadedError, PermissionDeniedError

Headers = Iterable[tuple[bytes, bytes]]
_ROUTES = {route.path: route for route in ROUTES if route.is_inference and "{" not in route.path}
_PROBES = frozenset(route.path for route in ROUTES if route.tag == "health")


class Shedding:
    """Says no where the guard of the route would, without a task and the layers of the framework in between.

    A flood has as many requests as anybody likes, and what each of them costs is taken from those that are served. Only
    what needs neither a wait nor the body is looked at here. Whatever is in doubt passes on to the guard: a key that
    has to be looked up, or is none; a route that has to be searched for; a server that leaves. What is refused here is
    counted as every request is, and is in the log with all others of its second, but in no trace.
    """

    def __init__(
        self,
        state: Any,
        observe: Callable[[str, str, int, float, str], None],
        count: Callable[[str, str, int, str], None],
    ) -> None:
        """`state` is the application's, with its `services`; `observe` takes method, route, status, seconds and code,
        `count` tenant, route, status and code."""
        self._state = state
        self._observe = observe
        self._count = count

    @property
    def is_full(self) -> bool:
        """Whether there is anybody for whom there is no room; quick, for all requests where there is."""
        services: Services = self._state.services
        has_room = services.gate.budgets.requests.has_room_for_all
        return not (has_room or services.is_draining or services.leaving.has_begun)

    def answer(self, head: Head, common: Headers) -> bytes | None:
        """Return the refusal as it is sent, with headers that all answers have; None for what passes on."""
        tenant = self._tenant(head)
        if tenant is None:
            return None
        refusal = self._state.services.gate.budgets.requests.refusal()
        return self._refuse(refusal, head, common, tenant, head.target, ends=head.closes)

    def answer_crowd(self, head: Head | None, common: Headers) -> bytes | None:
        """Return what a request on one connection too many hears, whatever it asks; None for a probe, which passes on.

        Its connection ends with it.
        """
        if head is not None and head.target.partition("?")[0] in _PROBES:
            return None
        refusal = OverloadedError("the server has as many connections open as it can have")
        return self._refuse(refusal, head, common, "", "unknown", ends=True)

    def _refuse(
        self, error: OverloadedError, head: Head | None, common: Headers, tenant: str, path: str, *, ends: bool
    ) -> bytes:
        began = time.monotonic()
        headers = {"X-Request-Id": request_id(None if head is None else head.headers.get("x-request-id"))}
        if ends:
            headers["Connection"] = "close"
        answer = error_response(error, {}, headers)
        lines = [b"HTTP/1.1 %d %b" % (error.status, HTTPStatus(error.status).phrase.encode())]
        lines += [b"%b: %b" % header for header in (*common, *answer.raw_headers)]
        method = "other" if head is None else head.method
        self._observe(method, path, error.status, time.monotonic() - began, error.code)
        self._count(tenant, path, error.status, error.code)
        return b"\r\n".join([*lines, b"", b"" if method == "HEAD" else bytes(answer.body)])

    def _tenant(self, head: Head) -> str | None:
        """Return for whom a full server has no room, where that is certain."""
        route = _ROUTES.get(head.target)
        if route is None or head.method != route.method:
            return None
        services: Services = self._state.services
        if services.keys.is_open:
            try:
                check_local(head.headers["host"], head.headers.get("origin"))
            except PermissionDeniedError:
                return None
        principal = services.keys.known(head.headers.get("authorization"))
        if principal is None or not principal.scopes.issuperset(route.scopes):
            return None
        return None if services.gate.budgets.requests.has_room(principal.tenant, 1) else principal.tenant
