"""Calls on their way into the log of calls: who, which route, what its path names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from fastapi import Request
from promptd_store import StoreError

from promptd.api.keys import actor
from promptd.api.services import principal_of, services_of

if TYPE_CHECKING:
    from promptd.api.routes import Route

NAMED = ("name", "file_id", "job_id", "tenant")
_log = structlog.get_logger(__name__)


async def note_changed(route: Route, request: Request, status: int) -> None:
    """Write down a call that changed something, before it is answered."""
    principal = principal_of(request)
    target = {name: request.path_params[name] for name in NAMED if name in request.path_params}
    action = f"{route.method} {route.path}"
    try:
        await services_of(request).calls.changed(principal.tenant, actor(principal), action, status, target)
    except StoreError as error:  # it is done, and will be written with the next one
        _log.warning("call_not_written", action=action, error=error.message)


def note_refused(route: Route, request: Request, status: int) -> None:
    """Count a call that was turned away."""
    principal = principal_of(request)
    by = actor(principal) if principal.tenant else ""
    services_of(request).calls.refused(principal.tenant, by, f"{route.method} {route.path}", status)
