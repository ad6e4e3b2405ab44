"""`/v1/fine_tuning/jobs`: training jobs in OpenAI's shapes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse

from promptd.api.files import page
from promptd.api.job_requests import idempotency_key, known_or_wanted, queue_of
from promptd.api.job_schemas import JobBody
from promptd.api.job_views import EVENT_PREFIX, checkpoint_views, event_view, job_view
from promptd.api.services import Services, principal_of, services_of, visit_of
from promptd.api.sse import event_stream, to_json
from promptd.errors import InvalidRequestError
from promptd.jobs import JobEvent, JobRecord
from promptd.training.job_spec import describe_methods

_MAX_LISTED = 100
_MAX_EVENTS = 1000
_DRAIN_POLL_SECONDS = 0.5


async def list_methods() -> Response:
    """List the ways of training, the default first, each with its hyper-parameters and their defaults."""
    methods = [{"object": "fine_tuning.method", **method} for method in describe_methods()]
    return JSONResponse({"object": "list", "data": methods, "has_more": False})


async def create_job(body: JobBody, request: Request) -> Response:
    """Start training; its rows and settings are checked before the answer."""
    services, principal = services_of(request), principal_of(request)
    jobs, key = queue_of(services), idempotency_key(request)
    outcome = await known_or_wanted(services, principal, body, name=body.suffix, key=key)
    return _respond(
        services, outcome if isinstance(outcome, JobRecord) else await jobs.create(principal.tenant, outcome)
    )


async def list_jobs(
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 20,
) -> Response:
    """List the caller's jobs, newest first."""
    services, principal = services_of(request), principal_of(request)
    found = await queue_of(services).list(principal.tenant, after=after, limit=limit + 1)
    return JSONResponse(page([job_view(job, services.model.served_name) for job in found], limit))


async def get_job(job_id: str, request: Request) -> Response:
    """Read one job."""
    services = services_of(request)
    return _respond(services, await queue_of(services).get(principal_of(request).tenant, job_id))


async def cancel_job(job_id: str, request: Request) -> Response:
    """Cancel; a running job stops within a step."""
    services = services_of(request)
    return _respond(services, await queue_of(services).cancel(principal_of(request).tenant, job_id))


async def pause_job(job_id: str, request: Request) -> Response:
    """Pause; what was learned so far is kept."""
    services = services_of(request)
    return _respond(services, await queue_of(services).pause(principal_of(request).tenant, job_id))


async def resume_job(job_id: str, request: Request) -> Response:
    """Put a paused job back in line."""
    services = services_of(request)
    return _respond(services, await queue_of(services).resume(principal_of(request).tenant, job_id))


async def delete_job(job_id: str, request: Request) -> Response:
    """Forget a job that has ended, its events too. The prompt that it has published stays."""
    services = services_of(request)
    await queue_of(services).delete(principal_of(request).tenant, job_id)
    return JSONResponse({"id": job_id, "object": "fine_tuning.job", "deleted": True})


async def list_events(
    job_id: str,
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_EVENTS)] = 20,
    stream: bool = False,
) -> Response:
    """List a job's events, newest first; with `stream` send them as they come, oldest first, until the job ends."""
    services, principal = services_of(request), principal_of(request)
    jobs = queue_of(services)
    seq = _seq(after)
    if stream:
        await jobs.get(principal.tenant, job_id)  # an unknown job is a 404, not an empty stream
        visit_of(request).hold_stream()
        events = jobs.follow(principal.tenant, job_id, after=seq)
        return event_stream(_until_drained(services, events))
    found = await jobs.events(principal.tenant, job_id, before=seq, limit=limit + 1)
    return JSONResponse(page([event_view(event) for event in found], limit))


async def list_checkpoints(
    job_id: str,
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 10,
) -> Response:
    """Show where a job would continue, or the version that it has published."""
    job = await queue_of(services_of(request)).get(principal_of(request).tenant, job_id)
    views = checkpoint_views(job)
    return JSONResponse(page([view for view in views if view["id"] != after], limit))


def _respond(services: Services, job: JobRecord) -> JSONResponse:
    return JSONResponse(job_view(job, services.model.served_name))


def _seq(after: str | None) -> int | None:
    """Read the cursor: the id of the last event that the caller has."""
    if after is None:
        return None
    digits = after.removeprefix(EVENT_PREFIX)
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidRequestError(f"after must be the id of an event, got {after!r}", param="after")
    return int(digits)


async def _until_drained(services: Services, events: AsyncIterator[JobEvent]) -> AsyncGenerator[list[str], None]:
    """Pass events on, and end when the server wants to stop."""
    waiting: asyncio.Future[JobEvent | None] | None = None
    try:
        while not services.is_draining:
            waiting = waiting or asyncio.ensure_future(anext(events, None))
            done, _ = await asyncio.wait([waiting], timeout=_DRAIN_POLL_SECONDS)
            if not done:
                continue
            event, waiting = waiting.result(), None
            if event is None:
                return
            yield [to_json(event_view(event))]
    finally:
        if waiting is not None:
            waiting.cancel()
