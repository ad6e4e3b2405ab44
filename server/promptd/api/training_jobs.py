"""`POST /admin/training/jobs`: one or hundreds of jobs in one call, one per user say."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from promptd_store import StoreError

from promptd.api.error_handlers import envelope
from promptd.api.job_requests import idempotency_key, known_or_wanted, queue_of
from promptd.api.job_schemas import BulkBody, BulkJob
from promptd.api.job_views import job_view
from promptd.api.services import principal_of, services_of
from promptd.errors import PromptdError
from promptd.jobs import JobRecord, JobRequest


async def create_jobs(body: BulkBody, request: Request) -> Response:
    """Start many jobs; 207 with one result for each, in their order: the job, or why there is none."""
    services, principal = services_of(request), principal_of(request)
    jobs, key = queue_of(services), idempotency_key(request)
    outcomes: list[JobRecord | JobRequest | PromptdError | StoreError] = []
    for number, job in enumerate(body.jobs):
        own_key = None if key is None else f"{key}/{number}"
        try:
            outcomes.append(
                await known_or_wanted(services, principal, _with_defaults(body, job), name=job.name, key=own_key)
            )
        except (PromptdError, StoreError) as error:
            outcomes.append(error)
    wanted = [one for one in outcomes if isinstance(one, JobRequest)]
    created = iter(await jobs.create_many(principal.tenant, wanted))
    results = [
        _result(number, next(created) if isinstance(one, JobRequest) else one, services.model.served_name)
        for number, one in enumerate(outcomes)
    ]
    return JSONResponse({"object": "list", "data": results}, status_code=207)


def _with_defaults(body: BulkBody, job: BulkJob) -> BulkJob:
    """A job's own fields before the defaults; its own rows or file replace the default ones of either kind."""
    given = {name: getattr(job, name) for name in job.model_fields_set}
    defaults = {name: getattr(body.defaults, name) for name in body.defaults.model_fields_set}
    if "rows" in given or "training_file" in given:
        defaults = {name: value for name, value in defaults.items() if name not in ("rows", "training_file")}
    return BulkJob.model_construct(**{**defaults, **given})


def _result(number: int, outcome: JobRecord | PromptdError | StoreError, model: str) -> dict[str, Any]:
    if isinstance(outcome, JobRecord):
        return {"index": number, "status": 200, "job": job_view(outcome, model)}
    return {"index": number, "status": outcome.status, **envelope(outcome)}
