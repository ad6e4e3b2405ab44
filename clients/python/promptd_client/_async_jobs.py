"""Training files and jobs, for asyncio. `Files` and `Jobs` are the same for ordinary code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import anyio
import anyio.to_thread

from promptd_client import _job_requests
from promptd_client._job_requests import JobOutcome
from promptd_client._jobs import RECONNECT_SECONDS
from promptd_client._peft import read_content
from promptd_client._stream import AsyncStream
from promptd_client.errors import StreamBrokenError
from promptd_client.job_models import File, Job, JobEvent
from promptd_client.job_options import BulkJobOptions, JobFields, JobOptions

if TYPE_CHECKING:
    from promptd_client._async_client import AsyncClient

FileList = list[File]  # `list` is a method
JobList = list[Job]


class AsyncFiles:
    """The caller's training files, `client.files`."""

    def __init__(self, client: AsyncClient) -> None:
        self._run = client.run

    async def create(self, content: bytes | str | Path, *, filename: str | None = None) -> File:
        """Upload JSON lines: bytes, or the path of a file."""
        name = filename or ("rows.jsonl" if isinstance(content, bytes) else Path(content).name)
        return await self._run(_job_requests.upload_file(name, await anyio.to_thread.run_sync(read_content, content)))

    async def list(self) -> FileList:
        """List all files, newest first."""
        files: FileList = []
        after: str | None = None
        while True:
            page = await self._run(_job_requests.list_files(after))
            files += page.data
            if not page.has_more or not page.data:
                return files
            after = page.data[-1].id

    async def get(self, file_id: str) -> File:
        """Read a file's description."""
        return await self._run(_job_requests.get_file(file_id))

    async def content(self, file_id: str) -> bytes:
        """Download a file."""
        return await self._run(_job_requests.file_content(file_id))

    async def delete(self, file_id: str) -> None:
        """Delete a file."""
        await self._run(_job_requests.delete_file(file_id))


class AsyncJobs:
    """The caller's training jobs, `client.jobs`."""

    def __init__(self, client: AsyncClient) -> None:
        self._run = client.run
        self._open = client.open

    async def create(self, **options: Unpack[JobOptions]) -> Job:
        """Start a job."""
        return await self._run(_job_requests.create_job(options))

    async def create_many(self, jobs: Sequence[BulkJobOptions], **defaults: Unpack[JobFields]) -> Sequence[JobOutcome]:
        """Start many jobs in one call (with an admin's key); each result is a job or its error, in their order."""
        return await self._run(_job_requests.create_jobs(jobs, defaults))

    async def list(self) -> JobList:
        """List all jobs, newest first."""
        jobs: JobList = []
        after: str | None = None
        while True:
            page = await self._run(_job_requests.list_jobs(after))
            jobs += page.data
            if not page.has_more or not page.data:
                return jobs
            after = page.data[-1].id

    async def get(self, job_id: str) -> Job:
        """Read one job."""
        return await self._run(_job_requests.get_job(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel; a running job stops within a step."""
        return await self._run(_job_requests.tell_job(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        """Pause; what was learned so far is kept."""
        return await self._run(_job_requests.tell_job(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        """Put a paused job back in line."""
        return await self._run(_job_requests.tell_job(job_id, "resume"))

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended, its events too; its prompt stays."""
        await self._run(_job_requests.delete_job(job_id))

    async def events(self, job_id: str, *, limit: int = 100) -> Sequence[JobEvent]:
        """Return a job's last events, newest first."""
        return await self._run(_job_requests.job_events(job_id, limit))

    async def follow(self, job_id: str, *, after: str | None = None) -> AsyncStream[JobEvent]:
        """Return a job's events as they come, oldest first, from behind the event `after`, until the job ends."""
        return await self._open(_job_requests.follow_job(job_id, after))

    async def wait(self, job_id: str, *, on_event: Callable[[JobEvent], None] | None = None) -> Job:
        """Wait until the job has ended, however often the connection breaks, and return it; each event comes once."""
        after: str | None = None
        while True:
            try:
                async with await self.follow(job_id, after=after) as events:
                    async for event in events:
                        after = event.id
                        if on_event is not None:
                            on_event(event)
            except StreamBrokenError:
                pass  # the server restarts, or a proxy has lost its patience: go on behind the last event
            job = await self.get(job_id)
            if job.has_ended:
                return job
            await anyio.sleep(RECONNECT_SECONDS)
