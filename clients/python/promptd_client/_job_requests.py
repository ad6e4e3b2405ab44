"""Requests for training files and jobs, written once for both clients. Nothing here does I/O."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from promptd_client._replies import event_reader, reader
from promptd_client._requests import Call, StreamCall, body_of
from promptd_client.errors import APIError, error_from_body
from promptd_client.job_models import File, FilePage, Job, JobEvent, JobPage
from promptd_client.job_options import BulkJobOptions, JobFields, JobOptions

FILES = "/v1/files"
JOBS = "/v1/fine_tuning/jobs"
PAGE = 100

JobOutcome = Job | APIError


def upload_file(filename: str, content: bytes) -> Call[File]:
    """Upload rows. A second copy does no harm but stays, so that it is not repeated unasked."""
    form = httpx.Request("POST", "http://form", files={"file": (filename, content)}, data={"purpose": "fine-tune"})
    headers = {"Content-Type": form.headers["Content-Type"]}
    return Call("POST", FILES, reader(File), headers=headers, content=form.read(), is_idempotent=False)


def list_files(after: str | None) -> Call[FilePage]:
    """List one page of files, newest first."""
    return Call("GET", FILES, reader(FilePage), params=_page(after))


def get_file(file_id: str) -> Call[File]:
    """Read a file's description."""
    return Call("GET", path_of(FILES, file_id), reader(File))


def file_content(file_id: str) -> Call[bytes]:
    """Download a file."""
    return Call("GET", path_of(FILES, file_id, "content"), lambda response: response.content)


def delete_file(file_id: str) -> Call[None]:
    """Delete a file. A second time it would not be found, so it is not repeated unasked."""
    return Call("DELETE", path_of(FILES, file_id), lambda response: None, is_idempotent=False)


def create_job(options: JobOptions) -> Call[Job]:
    """Start a job; under a key of its own it may be sent again and is still one job."""
    return Call("POST", JOBS, reader(Job), body=body_of({}, options), headers=_once())


def create_jobs(jobs: Sequence[BulkJobOptions], defaults: JobFields) -> Call[list[JobOutcome]]:
    """Start many jobs."""
    body = {"defaults": body_of({}, defaults), "jobs": [body_of({}, job) for job in jobs]}
    return Call("POST", "/admin/training/jobs", _read_outcomes, body=body, headers=_once())


def list_jobs(after: str | None) -> Call[JobPage]:
    """List one page of jobs, newest first."""
    return Call("GET", JOBS, reader(JobPage), params=_page(after))


def get_job(job_id: str) -> Call[Job]:
    """Read one job."""
    return Call("GET", path_of(JOBS, job_id), reader(Job))


def tell_job(job_id: str, what: str) -> Call[Job]:
    """Cancel, pause or resume; twice is as good as once."""
    return Call("POST", path_of(JOBS, job_id, what), reader(Job))


def delete_job(job_id: str) -> Call[None]:
    """Forget a job. A second time it would not be found, so it is not repeated unasked."""
    return Call("DELETE", path_of(JOBS, job_id), lambda response: None, is_idempotent=False)


def job_events(job_id: str, limit: int) -> Call[list[JobEvent]]:
    """Read a job's last events, newest first."""
    return Call("GET", path_of(JOBS, job_id, "events"), reader(list[JobEvent], "data"), params={"limit": str(limit)})


def follow_job(job_id: str, after: str | None) -> StreamCall[JobEvent]:
    """Read a job's events as they come, oldest first."""
    params = {"stream": "true"} | ({} if after is None else {"after": after})
    return StreamCall(path_of(JOBS, job_id, "events"), None, event_reader(JobEvent), method="GET", params=params)


_read_results = reader(list[dict[str, Any]], "data")


def _read_outcomes(response: httpx.Response) -> list[JobOutcome]:
    return [
        Job.model_validate(one["job"]) if "job" in one else error_from_body(one, one.get("status"))
        for one in _read_results(response)
    ]


def _once() -> Mapping[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def _page(after: str | None) -> dict[str, str]:
    return {"limit": str(PAGE)} | ({} if after is None else {"after": after})


def path_of(base: str, name: str, *more: str) -> str:
    """Return the path of one thing; raises `ValueError` for what would lead elsewhere."""
    if name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not an id")
    return "/".join([base, quote(name, safe=""), *more])
