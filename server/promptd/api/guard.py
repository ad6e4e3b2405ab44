"""What every request passes before its handler: who is it, may they, is there room; and what is left of it behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from promptd.api.auth import authorize, check_local
from promptd.api.call_notes import note_changed, note_refused
from promptd.api.services import VISIT, Limits, Services, services_of
from promptd.api.spool import SpoolingRequest
from promptd.api.stalls import without_stalls
from promptd.api.trail import trail_in, trail_of
from promptd.api.uploads import largest_upload, told_length
from promptd.errors import (
    AuthenticationError,
    DeadlineExceededError,
    InvalidRequestError,
    PermissionDeniedError,
    ShuttingDownError,
)
from promptd.tenancy import Claim, Principal, Scope

if TYPE_CHECKING:
    from promptd.api.routes import Route

BYTES_PER_TOKEN = 4
"""About right for English; a request's own tokens count once they are known."""


def guarded(route: Route, limits: Limits) -> type[APIRoute]:
    """A route class that decides on the headers alone, before a byte of the body is read or parsed."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            known = frozenset(_queries(self.dependant))

            async def checked(request: Request) -> Response:
                try:
                    response = await answered(request)
                except (AuthenticationError, PermissionDeniedError) as error:
                    note_refused(request, error.status)
                    raise
                if route.changes and response.status_code < 400:
                    await note_changed(request, response.status_code)
                return response

            async def answered(request: Request) -> Response:
                await admit(route, request)
                if route.scope is not Scope.OPEN:  # probes and scrapes may have what they like
                    check_query(request, known)
                limit_seconds = limits.request_timeout_seconds
                try:
                    async with asyncio.timeout(limit_seconds):  # also for a body that trickles in
                        response = await handle(SpoolingRequest(request.scope, request.receive))
                except TimeoutError:
                    raise DeadlineExceededError(f"the request took longer than {limit_seconds:g} seconds") from None
                if VISIT in request.scope:
                    response.headers.update(request.scope[VISIT].headers())
                if timing := trail_of(request).server_timing():
                    response.headers["Server-Timing"] = timing
                return response

            return checked

        async def handle(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
            try:
                await without_stalls(scope, receive, send, partial(super().handle, scope), limits.stall_seconds)
            finally:  # after the last byte, and also where nobody read it
                if VISIT in scope:
                    scope[VISIT].leave()
                if (trail := trail_in(scope)).runs:
                    scope["app"].state.services.trace(trail)

    return GuardedRoute


def _queries(dependant: Dependant) -> Iterator[str]:
    yield from (query.alias for query in dependant.query_params)
    for one in dependant.dependencies:
        yield from _queries(one)


def check_query(request: Request, known: Collection[str]) -> None:
    """Refuse parameters that a route does not have: `?dry-run=true` would publish."""
    for name in request.query_params:
        if name not in known:
            those = ", ".join(sorted(known)) or "none"
            raise InvalidRequestError(
                f"{name!r} is no query parameter of {request.method} {request.url.path}, which has {those}",
                param=name,
                code="unknown_field",
            )


async def admit(route: Route, request: Request) -> None:
    """Who is it, may they, do we still take work; raises typed errors."""
    services = services_of(request)
    request.state.principal = Principal("", frozenset())
    if route.scope is not Scope.OPEN:
        if services.keys.is_open:
            check_local(request.headers.get("host"), request.headers.get("origin"))
        principal = await services.keys.authenticate(request.headers.get("authorization"))
        request.state.principal = principal
        trail = trail_of(request)
        trail.operation, trail.tenant = route.operation, principal.tenant
        for scope in route.scopes:
            authorize(principal, scope)
    if services.is_draining and route.scope is Scope.INFER:
        raise ShuttingDownError("the server is shutting down", retry_after_seconds=5)
    if route.scope not in (Scope.OPEN, Scope.ADMIN):  # a tenant's limits must not keep an admin from changing them
        claim = claim_of(route, request, services)
        request.scope[VISIT] = await services.gate.enter(request.state.principal, claim)


def claim_of(route: Route, request: Request, services: Services) -> Claim:
    """Tell by the headers alone what a request will take. A body whose length they do not tell may have any."""
    largest = route.max_body_bytes(services.limits)
    if largest is None:
        largest = largest_upload(services, request)
    told = told_length(request)
    num_bytes = largest if told is None else min(told, largest)
    if route.is_large:
        return Claim(upload_bytes=num_bytes)
    if not route.is_inference:
        return Claim()
    longest = services.engine.engine.max_model_len
    return Claim(is_inference=True, num_tokens=min(-(-num_bytes // BYTES_PER_TOKEN), longest))
