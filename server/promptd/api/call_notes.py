"""Calls on their way into the log of calls: who, which route, what its path names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog
from fastapi import Request
from promptd_store import Append, StoreError

from promptd.api.keys import actor
from promptd.api.services import principal_of, services_of

NAMED = ("name", "file_id", "job_id", "tenant")
_log = structlog.get_logger(__name__)


async def note_changed(request: Request, status: int) -> None:
    """Write down a call that changed something, before it is answered, unless the step that did it has."""
    if getattr(request.state, "is_noted", False):
        return
    try:
        await services_of(request).calls.changed(*_facts(request, status))
    except StoreError as error:  # it is done, and will be written with the next one
        _log.warning("call_not_written", action=_action(request), error=error.message)


@contextmanager
def noting(request: Request) -> Iterator[Callable[[int], Append]]:
    """For a call that one step does: gives what makes the entry for that very step, of the answer's status."""
    is_made = False

    def note(status: int) -> Append:
        nonlocal is_made
        is_made = True
        return services_of(request).calls.entry(*_facts(request, status))

    yield note
    request.state.is_noted = is_made


def note_refused(request: Request, status: int) -> None:
    """Count a call that was turned away."""
    principal = principal_of(request)
    by = actor(principal) if principal.tenant else ""
    services_of(request).calls.refused(principal.tenant, by, _action(request), status)


def _facts(request: Request, status: int) -> tuple[str, str, str, int, Mapping[str, str]]:
    principal = principal_of(request)
    target = {name: request.path_params[name] for name in NAMED if name in request.path_params}
    return principal.tenant, actor(principal), _action(request), status, target


def _action(request: Request) -> str:
    return f"{request.method} {request.scope['route'].path}"
