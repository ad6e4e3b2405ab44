"""Erasing on several servers over one Redis: each says when it has forgotten, and one that cannot is named."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from promptd_store.redis_backend.store import RedisStore

from promptd.jobs import LEASE_SECONDS
from tests.engine.harness import library
from tests.fault_proxy import proxied
from tests.patience import until
from tests.redis_server import RedisServer
from tests.replicas import Replica, ReplicaForge, running_replicas
from tests.training.site import ENDLESS, method_of

ADMIN_KEY = "key-of-the-admin"
CANARY = "canary-8c2f71"
GONE_SECONDS = 60.0
CUT_OFF_SECONDS = 5.0
ROWS = "".join(json.dumps({"text": f"{CANARY} {n}", "label": "ab"[n % 2]}) + "\n" for n in range(24))


@dataclass
class Admin:
    """An admin at one server."""

    http: httpx.Client

    def key_of(self, tenant: str) -> str:
        """Issue a key."""
        key: str = self.http.post("/admin/keys", json={"tenant": tenant}).raise_for_status().json()["key"]
        return key

    def erase(self, tenant: str) -> dict[str, int]:
        """Erase a tenant; return the report."""
        report: dict[str, int] = self.http.delete(f"/admin/tenants/{tenant}").raise_for_status().json()["erased"]
        return report

    def forgotten_by(self, tenant: str) -> dict[int, bool]:
        """Which processes say that they have forgotten a tenant."""
        told = self.http.get(f"/admin/tenants/{tenant}").raise_for_status().json()["servers"]
        return {one["pid"]: one["has_forgotten"] for one in told}


@contextmanager
def admins(replicas: list[Replica]) -> Iterator[list[Admin]]:
    """An admin at each server."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    clients = [httpx.Client(base_url=replica.url, headers=headers, timeout=30) for replica in replicas]
    try:
        yield [Admin(client) for client in clients]
    finally:
        for client in clients:
            client.close()


def resident(replica: Replica) -> int:
    """Prompts that a server has in memory."""
    lines = httpx.get(f"{replica.url}/metrics", timeout=30).text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("promptd_prompts_resident "))))


def ask(replica: Replica, key: str, model: str) -> int:
    """Use a prompt; return the status."""
    body = {"model": model, "prompt": list(range(5, 40)), "max_tokens": 2}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{replica.url}/v1/completions", json=body, headers=headers, timeout=30).status_code


def publish(replica: Replica, key: str, model: Path) -> None:
    """Publish a soft prompt as a tenant."""
    content = library(model)[0].content
    httpx.put(
        f"{replica.url}/v1/prompts/tone", content=content, headers={"Authorization": f"Bearer {key}"}, timeout=30
    ).raise_for_status()


def test_every_server_says_that_it_has_forgotten(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Both acknowledge before the answer; one that stands still is named until it goes on, and has it so long."""
    with (
        running_replicas(forge, tmp_path, redis.url, admin_key=ADMIN_KEY) as replicas,
        admins(replicas) as (admin, other),
    ):
        here, there = replicas
        keys = {tenant: admin.key_of(tenant) for tenant in ("acme", "globex")}
        for key in keys.values():
            publish(here, key, forge.model)
        before = resident(there)
        assert [ask(replica, key, "tone") for replica in replicas for key in keys.values()] == [200] * 4
        assert resident(there) == before + 2
        assert admin.erase("acme")["pending_servers"] == 0
        for one in (admin, other):
            assert one.forgotten_by("acme") == {here.pid: True, there.pid: True}
        assert resident(there) == before + 1
        there.signal(signal.SIGSTOP)
        assert admin.erase("globex")["pending_servers"] == 1
        assert admin.forgotten_by("globex") == {here.pid: True, there.pid: False}
        assert admin.forgotten_by("acme") == {here.pid: True, there.pid: True}
        there.signal(signal.SIGCONT)
        until(lambda: admin.forgotten_by("globex") == {here.pid: True, there.pid: True}, "it has caught up")
        assert resident(there) == before
        assert "servers" not in admin.http.get("/admin/tenants/default").json()


def fill(replica: Replica, key: str, model: Path) -> str:
    """Give a tenant prompts, files and a job that does not end, with the canary; return the job's id."""
    publish(replica, key, model)
    with httpx.Client(base_url=replica.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as http:
        http.put("/v1/prompts/persona", json={"text": f"You are {CANARY}."}).raise_for_status()
        upload = {"file": (f"{CANARY}.jsonl", ROWS.encode())}
        file = http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).raise_for_status().json()["id"]
        large = {"file": ("large.jsonl", ROWS.encode() * 2000)}  # too large to lie in Redis
        http.post("/v1/files", files=large, data={"purpose": "fine-tune"}).raise_for_status()
        body = {"training_file": file, "suffix": "learned", "method": method_of(**ENDLESS), "user": CANARY}
        job: str = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        until(lambda: http.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"] != [], "the job has saved")
    return job


def where_found(folder: Path, replicas: list[Replica]) -> list[str]:
    """Files (Redis' own, blobs, logs) and servers' metrics that hold the canary."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [path.name for path in files if CANARY in path.name or CANARY.encode() in path.read_bytes()]
    return found + [one.url for one in replicas if CANARY in httpx.get(f"{one.url}/metrics", timeout=30).text]


async def left_in_store(url: str, tenant: str) -> list[Any]:
    """Records and blobs that the store still has of a tenant."""
    store = await RedisStore.open(url, allow_volatile=True)  # it need not know where large files lie
    try:
        return [*await store.scan(f"{{{tenant}}}:"), *await store.scan_blobs(tenant)]
    finally:
        await store.close()


@pytest.mark.long
def test_nothing_is_found_after_a_partition(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """A tenant is erased while one server is cut off and a worker trains for it: within a minute nothing is left.

    The control is what was there before, and what the server that is cut off has until it is back.
    """
    settings = {"admin_key": ADMIN_KEY, "training": "worker", "blobs": str(tmp_path / "blobs")}
    with (
        proxied(redis.port) as proxy,
        running_replicas(forge, tmp_path, redis.url, 1, **settings) as (here,),
        running_replicas(forge, tmp_path, f"redis://127.0.0.1:{proxy.port}?socket_timeout=0.5", 1, **settings) as (
            there,
        ),
        admins([here, there]) as (admin, _),
        running_worker(forge, redis, tmp_path, blobs=settings["blobs"]),
    ):
        both = [here, there]
        key, before = admin.key_of("acme"), [resident(one) for one in both]
        fill(here, key, forge.model)
        assert [ask(one, key, name) for one in both for name in ("tone", "persona")] == [200] * 4
        assert len(where_found(tmp_path, both)) >= 2 and asyncio.run(left_in_store(redis.url, "acme")) != []
        held = resident(there)
        proxy.mode = "swallow"
        began = time.monotonic()
        report = admin.erase("acme")
        print(report)
        assert (report["jobs"], report["files"], report["prompts"], report["pending_servers"]) == (1, 2, 2, 1)
        assert ask(here, key, "tone") == 401
        assert admin.forgotten_by("acme") == {here.pid: True, there.pid: False}
        served = [ask(there, key, "tone") for _ in range(3)]
        assert resident(there) == held > before[1]
        time.sleep(CUT_OFF_SECONDS)
        proxy.mode = "pass"
        healed = time.monotonic()
        until(lambda: all(admin.forgotten_by("acme").values()), "it has caught up")
        caught_up = time.monotonic() - healed
        until(lambda: ask(there, key, "tone") == 401, "it knows that the key has ended")
        until(lambda: [resident(one) for one in both] == before, "no keys and values of it")
        until(lambda: where_found(tmp_path, both) == [], "no byte of it in a file")
        seconds = time.monotonic() - began
        print(
            f"cut off: {served}; {caught_up:.1f} s after it was back it had forgotten; all gone after {seconds:.1f} s"
        )
        assert seconds <= GONE_SECONDS
        time.sleep(2 * LEASE_SECONDS)  # whoever was late has come
        assert asyncio.run(left_in_store(redis.url, "acme")) == []
        assert where_found(tmp_path, both) == []
        assert [ask(one, key, "tone") for one in both] == [401, 401]


@contextmanager
def running_worker(forge: ReplicaForge, redis: RedisServer, folder: Path, **settings: Any) -> Iterator[None]:
    """Run a worker for a block, which takes its time."""
    worker = Replica(
        forge, folder, redis.url, worker=True, traits={"step_seconds": 0.02}, checkpoint_seconds=0.5, **settings
    )
    try:
        worker.start()
        yield
    finally:
        worker.close()
