"""`/admin/drain`: the first half of SIGTERM, for operators and for hooks that run before it."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.services import Services, services_of


async def start_drain(request: Request) -> Response:
    """Make /readyz say no; every request is still served, and each answer ends its connection."""
    services = services_of(request)
    services.leaving.begin()
    return _shown(services)


async def get_drain(request: Request) -> Response:
    """Say for how long the server has been leaving, and what still runs on it."""
    return _shown(services_of(request))


async def end_drain(request: Request) -> Response:
    """Make it ready again; 409 once a signal has come."""
    services = services_of(request)
    services.leaving.take_back()
    return _shown(services)


def _shown(services: Services) -> Response:
    stats = services.engine.stats()
    seconds = services.leaving.seconds
    return JSONResponse(
        {
            "status": "serving" if seconds is None else "draining",
            "seconds": None if seconds is None else round(seconds, 3),
            "leave_seconds": services.limits.leave_seconds,
            "requests_running": stats.num_requests_running,
            "requests_waiting": stats.num_requests_waiting,
        }
    )
