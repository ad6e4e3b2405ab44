"""Training files and jobs, for ordinary code. `AsyncFiles` and `AsyncJobs` are the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from promptd_client import _job_requests
from promptd_client._job_requests import JobOutcome
from promptd_client._peft import read_content
from promptd_client._stream import Stream
from promptd_client.errors import StreamBrokenError
from promptd_client.job_models import File, Job, JobEvent
from promptd_client.job_options import BulkJobOptions, JobFields, JobOptions

if TYPE_CHECKING:
    from promptd_client._client import Client

FileList = list[File]  # `list` is a method
JobList = list[Job]

RECONNECT_SECONDS = 1.0


class Files:
    """The caller's training files, `client.files`."""

    def __init__(self, client: Client) -> None:
        self._run = client.run

    def create(self, content: bytes | str | Path, *, filename: str | None = None) -> File:
        """Upload JSON lines: bytes, or the path of a file."""
        name = filename or ("rows.jsonl" if isinstance(content, bytes) else Path(content).name)
        return self._run(_job_requests.upload_file(name, read_content(content)))

    def list(self) -> FileList:
        """List all files, newest first."""
        files: FileList = []
        after: str | None = None
        while True:
            page = self._run(_job_requests.list_files(after))
            files += page.data
            if not page.has_more or not page.data:
                return files
            after = page.data[-1].id

    def get(self, file_id: str) -> File:
        """Read a file's description."""
        return self._run(_job_requests.get_file(file_id))

    def content(self, file_id: str) -> bytes:
        """Download a file."""
        return self._run(_job_requests.file_content(file_id))

    def delete(self, file_id: str) -> None:
        """Delete a file."""
        self._run(_job_requests.delete_file(file_id))


class Jobs:
    """The caller's training jobs, `client.jobs`."""

    def __init__(self, client: Client) -> None:
        self._run = client.run
        self._open = client.open

    def create(self, **options: Unpack[JobOptions]) -> Job:
        """Start a job."""
        return self._run(_job_requests.create_job(options))

    def create_many(self, jobs: Sequence[BulkJobOptions], **defaults: Unpack[JobFields]) -> Sequence[JobOutcome]:
        """Start many jobs in one call (with an admin's key); each result is a job or its error, in their order."""
        return self._run(_job_requests.create_jobs(jobs, defaults))

    def list(self) -> JobList:
        """List all jobs, newest first."""
        jobs: JobList = []
        after: str | None = None
        while True:
            page = self._run(_job_requests.list_jobs(after))
            jobs += page.data
            if not page.has_more or not page.data:
                return jobs
            after = page.data[-1].id

    def get(self, job_id: str) -> Job:
        """Read one job."""
        return self._run(_job_requests.get_job(job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel; a running job stops within a step."""
        return self._run(_job_requests.tell_job(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        """Pause; what was learned so far is kept."""
        return self._run(_job_requests.tell_job(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        """Put a paused job back in line."""
        return self._run(_job_requests.tell_job(job_id, "resume"))

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, its events too; its prompt stays."""
        self._run(_job_requests.delete_job(job_id))

    def events(self, job_id: str, *, limit: int = 100) -> Sequence[JobEvent]:
        """Return a job's last events, newest first."""
        return self._run(_job_requests.job_events(job_id, limit))

    def follow(self, job_id: str, *, after: str | None = None) -> Stream[JobEvent]:
        """Return a job's events as they come, oldest first, from behind the event `after`, until the job ends."""
        return self._open(_job_requests.follow_job(job_id, after))

    def wait(self, job_id: str, *, on_event: Callable[[JobEvent], None] | None = None) -> Job:
        """Wait until the job has ended, however often the connection breaks, and return it; each event comes once."""
        after: str | None = None
        while True:
            try:
                with self.follow(job_id, after=after) as events:
                    for event in events:
                        after = event.id
                        if on_event is not None:
                            on_event(event)
            except StreamBrokenError:
                pass  # the server restarts, or a proxy has lost its patience: go on behind the last event
            job = self.get(job_id)
            if job.has_ended:
                return job
            time.sleep(RECONNECT_SECONDS)
