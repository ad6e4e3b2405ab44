"""Training on several worker processes over Redis, killed at random: every job ends, once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from promptd.jobs import LEASE_SECONDS
from promptd.training.job import CHECKPOINT_SECONDS
from tests.patience import until
from tests.redis_server import RedisServer
from tests.replicas import Replica, ReplicaForge, running_replicas
from tests.training.site import ROWS, method_of

SHORT_LEASE_SECONDS = 2.0
STEP_SECONDS = 0.01
"""Of 80 steps of both jobs: on no machine are they done before they are killed."""
END_SECONDS = 1800.0
"""What it takes to make all steps."""
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

    def until(self, holds: Callable[[dict[str, Any]], bool], seconds: float) -> None:
        """Wait until something holds of all jobs."""
        until(lambda: all(holds(job) for job in self.look()), self, seconds=seconds, pause_seconds=0.1)

    def __repr__(self) -> str:
        return repr(self.look())

    def starts(self, job: dict[str, Any]) -> list[float]:
        """When workers started a job, first to last."""
        events = self._http.get(f"/v1/fine_tuning/jobs/{job['id']}/events", params={"limit": 100}).json()["data"]
        return sorted(event["created_at"] for event in events if "has started the job" in event["message"])

    def kept(self, job: dict[str, Any]) -> float:
        """Up to when a job's work is safe: its checkpoint, or the start without one; in whole seconds, rounded down."""
        saved = self._http.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints").json()["data"]
        return max([self.starts(job)[-1], *(one["created_at"] for one in saved)])

    def num_versions(self, job: dict[str, Any]) -> int:
        """How many versions a job has published."""
        return len(self._http.get(f"/v1/prompts/{job['fine_tuned_model']}/versions").json()["data"])


def is_ended(job: dict[str, Any]) -> bool:
    """Whether a job is over."""
    return job["status"] in ("succeeded", "failed", "cancelled")


@dataclass
class Slowest:
    """The worst of all kills; times on the wire are whole seconds, so both are up to one too long."""

    redelivery_seconds: float = 0.0
    """From a kill until a job went on."""
    lost_seconds: float = 0.0
    """Work of a job that a kill has undone."""


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
    **options: Any,
) -> Slowest:
    """Two workers, killed together amid their work and started again: whatever ran must go on, and end once."""
    dice, killed, num_seen, slowest = random.Random(3), 0.0, 0, Slowest()
    left: list[dict[str, Any]] = []
    settings = {"training": "worker", **options}
    traits = {"lease_seconds": lease_seconds, "step_seconds": step_seconds}
    workers = [Replica(forge, folder, redis.url, worker=True, traits=traits, **settings) for _ in range(2)]
    with (
        running_replicas(forge, folder, redis.url, 1, **settings) as (server,),
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        jobs = Watched(http, num_jobs, num_steps)

        def is_back(job: dict[str, Any]) -> bool:
            return is_ended(job) or jobs.starts(job)[-1:] > [killed]

        def go_on() -> None:
            for worker in workers:
                worker.start()
            jobs.until(is_back, lease_seconds + START_SECONDS)
            waited = [jobs.starts(job)[-1] + 1 - killed for job in left]
            slowest.redelivery_seconds = max([slowest.redelivery_seconds, *waited])

        try:
            for _ in range(num_kills):
                go_on()
                time.sleep(max_pause_seconds * dice.random())
                for worker in workers:
                    worker.kill()
                killed = time.time()
                left = [job for job in jobs.look() if not is_ended(job)]
                num_seen += len(left)
                slowest.lost_seconds = max([slowest.lost_seconds, *(killed - jobs.kept(job) for job in left)])
            go_on()
            print(
                f"{num_kills} times both workers killed: {num_jobs} jobs, continued {num_seen} times, "
                f"within {slowest.redelivery_seconds:.1f} s, at most {slowest.lost_seconds:.1f} s of work lost"
            )
            jobs.until(is_ended, END_SECONDS)
        finally:
            for worker in workers:
                worker.close()
        ended = jobs.look()
        assert [job["status"] for job in ended] == ["succeeded"] * num_jobs, [job.get("error") for job in ended]
        assert [jobs.num_versions(job) for job in ended] == [1] * num_jobs
        assert num_seen, "the control: the kills met running jobs"
    return slowest


def test_killed_workers_lose_no_job(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """A kill -9: what ran goes on from its checkpoint when the lease is over; each job publishes one version."""
    short = {"lease_seconds": SHORT_LEASE_SECONDS, "step_seconds": STEP_SECONDS, "checkpoint_seconds": 0.5}
    train_and_kill(forge, redis, tmp_path, num_jobs=2, num_steps=80, num_kills=1, **short)


@pytest.mark.long
def test_thirty_times_both_workers(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """60 kills of a worker, over 8 jobs, with leases and checkpoints as they are without a choice."""
    slowest = train_and_kill(
        forge, redis, tmp_path, num_jobs=8, num_steps=1200, num_kills=30, max_pause_seconds=16.0, step_seconds=0.05
    )
    assert slowest.redelivery_seconds <= 20
    assert slowest.lost_seconds <= CHECKPOINT_SECONDS
