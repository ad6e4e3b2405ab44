"""Training on several worker processes over Redis, killed at random: every job ends, once."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from promptd.jobs import LEASE_SECONDS
from tests.redis_server import RedisServer
from tests.replicas import Replica, ReplicaForge, running_replicas
from tests.training.site import ROWS, method_of

SHORT_LEASE_SECONDS = 2.0
STEP_SECONDS = 0.01
"""Of 80 steps of both jobs: on no machine are they done before they are killed."""
START_SECONDS = 120.0
"""What a machine with much else to do takes to bring a worker up and to its first claim."""


class Watched:
    """The jobs of a test, over HTTP."""

    def __init__(self, http: httpx.Client, num_jobs: int, num_steps: int) -> None:
        self._http = http
        defaults = {"rows": ROWS, "method": method_of(num_steps=num_steps), "publish_worse": True}
        jobs = [{"name": f"job-{number}", "seed": number} for number in range(num_jobs)]
        answer = http.post("/admin/training/jobs", json={"defaults": defaults, "jobs": jobs})
        assert answer.status_code == 207 and all(one["status"] == 200 for one in answer.json()["data"]), answer.text
        self._ids = [one["job"]["id"] for one in answer.json()["data"]]

    def look(self) -> list[dict[str, Any]]:
        """All jobs as they are."""
        return [self._http.get(f"/v1/fine_tuning/jobs/{job_id}").json() for job_id in self._ids]

    def until(self, holds: Any, seconds: float) -> None:
        """Wait until something holds of all jobs."""
        until = time.monotonic() + seconds
        while not all(holds(job) for job in self.look()):
            assert time.monotonic() < until, self.look()
            time.sleep(0.1)

    def starts(self, job: dict[str, Any]) -> list[float]:
        """When workers started a job, first to last."""
        events = self._http.get(f"/v1/fine_tuning/jobs/{job['id']}/events", params={"limit": 100}).json()["data"]
        return sorted(event["created_at"] for event in events if "has started the job" in event["message"])

    def num_versions(self, job: dict[str, Any]) -> int:
        """How many versions a job has published."""
        return len(self._http.get(f"/v1/prompts/{job['fine_tuned_model']}/versions").json()["data"])


def is_ended(job: dict[str, Any]) -> bool:
    """Whether a job is over."""
    return job["status"] in ("succeeded", "failed", "cancelled")


def train_and_kill(
    forge: ReplicaForge,
    redis: RedisServer,
    folder: Path,
    *,
    num_jobs: int,
    num_steps: int,
    num_kills: int,
    lease_seconds: float = LEASE_SECONDS,
    step_seconds: float = 0.0,
    max_pause_seconds: float = 0.5,
) -> float:
    """Two workers, killed together amid their work and started again: whatever ran must go on.

    Returns the seconds that the slowest job took to go on.
    """
    dice, killed, num_seen, slowest = random.Random(3), 0.0, 0, 0.0
    left: list[dict[str, Any]] = []
    settings = {"training": "worker", "checkpoint_seconds": 0.5}
    traits = {"lease_seconds": lease_seconds, "step_seconds": step_seconds}
    workers = [Replica(forge, folder, redis.url, worker=True, traits=traits, **settings) for _ in range(2)]
    with (
        running_replicas(forge, folder, redis.url, 1, **settings) as (server,),
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        jobs = Watched(http, num_jobs, num_steps)

        def is_back(job: dict[str, Any]) -> bool:
            return is_ended(job) or jobs.starts(job)[-1:] > [killed]

        try:
            for _ in range(num_kills):
                for worker in workers:
                    worker.start()
                jobs.until(is_back, lease_seconds + START_SECONDS)
                slowest = max([slowest, *(jobs.starts(job)[-1] - killed for job in left)])
                time.sleep(max_pause_seconds * dice.random())
                for worker in workers:
                    worker.kill()
                killed = time.time()
                left = [job for job in jobs.look() if not is_ended(job)]
                num_seen += len(left)
            for worker in workers:
                worker.start()
            jobs.until(is_back, lease_seconds + START_SECONDS)
            slowest = max([slowest, *(jobs.starts(job)[-1] - killed for job in left)])
            jobs.until(is_ended, 600)
        finally:
            for worker in workers:
                worker.close()
        ended = jobs.look()
        print(
            f"{num_kills} times all workers killed: {num_jobs} jobs, continued {num_seen} times, within {slowest:.1f} s"
        )
        assert [job["status"] for job in ended] == ["succeeded"] * num_jobs, [job.get("error") for job in ended]
        assert [jobs.num_versions(job) for job in ended] == [1] * num_jobs
        assert num_seen, "the control: the kills met running jobs"
    return slowest


def test_killed_workers_lose_no_job(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """A kill -9: what ran goes on from its checkpoint when the lease is over; each job publishes one version."""
    short = {"lease_seconds": SHORT_LEASE_SECONDS, "step_seconds": STEP_SECONDS}
    train_and_kill(forge, redis, tmp_path, num_jobs=2, num_steps=80, num_kills=1, **short)


@pytest.mark.long
def test_thirty_times_both_workers(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """60 kills of a worker, over 8 jobs."""
    slowest = train_and_kill(
        forge, redis, tmp_path, num_jobs=8, num_steps=4000, num_kills=30, max_pause_seconds=6.0, step_seconds=0.005
    )
    assert slowest <= 20
