"""Training on several worker processes over Redis, killed at random: every job ends, once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

NUM_KILLS = 10
SHORT_LEASE_SECONDS = 2.0
STEP_SECONDS = 0.1
"""Of 40 steps of each job: on no machine are they all done before the last kill."""
MAX_PAUSE_SECONDS = 0.4
"""From a job's beginning until its worker is killed."""
AWAY_SECONDS = 0.3
"""How long Redis is gone."""
END_SECONDS = 1800.0
"""What it takes to make all steps."""
START_SECONDS = 120.0
"""What a machine with much else to do takes to bring a worker up and to its first claim."""


class Watched:
    """The jobs of a test, over HTTP."""

    def __init__(self, http: httpx.Client, num_jobs: int, **hyperparameters: int) -> None:
        self._http = http
        defaults = {"rows": ROWS, "method": method_of(**hyperparameters), "publish_worse": True}
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


@contextmanager
def two_workers(
    forge: ReplicaForge, redis: RedisServer, folder: Path, traits: dict[str, float], **settings: Any
) -> Iterator[list[Replica]]:
    """Have two for a block, which the block starts."""
    settings = {"training": "worker", **settings}
    workers = [Replica(forge, folder, redis.url, worker=True, traits=traits, **settings) for _ in range(2)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


@contextmanager
def server(forge: ReplicaForge, redis: RedisServer, folder: Path) -> Iterator[httpx.Client]:
    """Have one that leaves its jobs to workers, for a block; yields a client of it."""
    with (
        running_replicas(forge, folder, redis.url, 1, training="worker") as (one,),
        httpx.Client(base_url=one.url, timeout=30) as http,
    ):
        yield http


def num_begun(worker: Replica) -> int:
    """Count the jobs that a worker has begun, in all its lives, by its log."""
    return worker.log.read_text().count('"state": "running"') if worker.log.exists() else 0


def kill_amid_work(worker: Replica, num_before: int, pause_seconds: float) -> int:
    """Kill a worker some time after it has begun one more job than before; return how many it has begun then."""
    until(lambda: num_begun(worker) > num_before, worker, seconds=START_SECONDS)
    time.sleep(pause_seconds)
    worker.kill()
    return num_begun(worker)


def check_ended(jobs: Watched) -> None:
    """All have succeeded, and published one version each."""
    ended = jobs.look()
    assert {job["status"] for job in ended} == {"succeeded"}, [job.get("error") for job in ended]
    assert {jobs.num_versions(job) for job in ended} == {1}


def test_killed_workers_lose_no_job(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Ten times a worker is killed at some moment of a job: each goes on elsewhere when its lease is over, from its
    checkpoint, and publishes one version. Amid all this Redis is killed, too, and started again."""
    dice, lease = random.Random(3), {"lease_seconds": SHORT_LEASE_SECONDS}
    slow = {**lease, "step_seconds": STEP_SECONDS}
    with server(forge, redis, tmp_path) as http:
        jobs = Watched(http, num_jobs=NUM_KILLS, num_steps=40, batch_size=1, num_evaluations=1)
        with two_workers(forge, redis, tmp_path, slow, max_training_jobs=1, checkpoint_seconds=0.1) as workers:
            for worker in workers:
                worker.start()
            num_seen = [0, 0]
            for number in range(NUM_KILLS):
                if number == NUM_KILLS // 2:
                    redis.kill()
                    time.sleep(AWAY_SECONDS)
                    redis.start()
                worker = workers[number % 2]
                num_seen[number % 2] = kill_amid_work(worker, num_seen[number % 2], MAX_PAUSE_SECONDS * dice.random())
                if number < NUM_KILLS - 2:
                    worker.start()
        with two_workers(forge, redis, tmp_path, lease) as workers:
            for worker in workers:
                worker.start()
            jobs.until(is_ended, START_SECONDS)
        check_ended(jobs)
        num_starts = sum(len(jobs.starts(job)) for job in jobs.look())
        print(f"{NUM_KILLS} kills of a worker: {NUM_KILLS} jobs, started {num_starts} times")
        assert num_starts >= 2 * NUM_KILLS, "the control: each kill met a running job"


@pytest.mark.long
def test_thirty_times_both_workers(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """60 kills of a worker, over 8 jobs, with leases and checkpoints as they are without a choice."""
    dice, killed, num_seen = random.Random(3), 0.0, 0
    redelivery_seconds = lost_seconds = 0.0  # on the wire are whole seconds: both are up to one too long
    left: list[dict[str, Any]] = []
    with (
        server(forge, redis, tmp_path) as http,
        two_workers(forge, redis, tmp_path, {"step_seconds": 0.05}) as workers,
    ):
        jobs = Watched(http, num_jobs=8, num_steps=1200)

        def is_back(job: dict[str, Any]) -> bool:
            return is_ended(job) or jobs.starts(job)[-1:] > [killed]

        for round_number in range(31):
            for worker in workers:
                worker.start()
            jobs.until(is_back, LEASE_SECONDS + START_SECONDS)
            waited = [jobs.starts(job)[-1] + 1 - killed for job in left]
            redelivery_seconds = max([redelivery_seconds, *waited])
            if round_number == 30:
                break
            time.sleep(16 * dice.random())
            for worker in workers:
                worker.kill()
            killed = time.time()
            left = [job for job in jobs.look() if not is_ended(job)]
            num_seen += len(left)
            lost_seconds = max([lost_seconds, *(killed - jobs.kept(job) for job in left)])
        print(
            f"30 times both workers killed: 8 jobs, continued {num_seen} times, "
            f"within {redelivery_seconds:.1f} s, at most {lost_seconds:.1f} s of work lost"
        )
        jobs.until(is_ended, END_SECONDS)
        check_ended(jobs)
    assert num_seen, "the control: the kills met running jobs"
    assert redelivery_seconds <= 20
    assert lost_seconds <= CHECKPOINT_SECONDS
