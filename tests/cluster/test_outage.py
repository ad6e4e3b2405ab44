"""Several servers over one Redis: what one publishes the others serve, and what they all do while Redis is away."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from promptd_store import PromptArtifact

from promptd.tenancy.directory import MAX_OUTAGE_SECONDS
from tests.engine.harness import library
from tests.patience import PATIENCE_SECONDS, until
from tests.redis_server import RedisServer, running_redis
from tests.replicas import Replica, ReplicaForge, running_replicas

ROUNDS = 10
GIVE_UP_SECONDS = 0.5
"""After which servers give up on an answer of Redis."""
LONG_AGO_SECONDS = MAX_OUTAGE_SECONDS + 5


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of these tests' own: it is there at the end of each."""
    with running_redis(tmp_path_factory.mktemp("outage")) as server:
        yield server


@pytest.fixture(scope="module")
def replicas(
    forge: ReplicaForge, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Replica]]:
    """Two ready servers over it, which give up on its answers soon."""
    store = f"{redis.url}?socket_timeout={GIVE_UP_SECONDS}"
    with running_replicas(forge, tmp_path_factory.mktemp("replicas"), store) as two:
        yield two


@pytest.fixture(scope="module")
def prompts(tiny_models: dict[str, Path]) -> tuple[PromptArtifact, ...]:
    """Soft prompts and prefixes of the tiny model."""
    return library(tiny_models["llama"])[:6]


def client(replica: Replica) -> httpx.Client:
    """A patient one."""
    return httpx.Client(base_url=replica.url, timeout=PATIENCE_SECONDS)


def num_looks(http: httpx.Client) -> float:
    """How often a server has looked at what others changed."""
    (found,) = re.findall(
        r'^promptd_store_seconds_count{operation="read_log"} (.+)$', http.get("/metrics").text, re.MULTILINE
    )
    return float(found)


@contextlib.contextmanager
def away(redis: RedisServer, how: str) -> Iterator[None]:
    """Redis is killed, or silent, for a block; it is back behind it, whatever the block found."""
    redis.kill() if how == "killed" else redis.pause()
    try:
        yield
    finally:
        redis.start() if how == "killed" else redis.resume()


def complete(http: httpx.Client, model: str) -> httpx.Response:
    """Ask for two tokens."""
    return http.post("/v1/completions", json={"model": model, "prompt": "the quick", "max_tokens": 2})


def test_what_one_publishes_the_other_serves(replicas: list[Replica], prompts: tuple[PromptArtifact, ...]) -> None:
    """A prompt, a new version of it and its deletion on one server are true on the other at the very next request."""
    with client(replicas[0]) as one, client(replicas[1]) as two:
        for number, artifact in enumerate(prompts):
            assert one.put("/v1/prompts/tone", content=artifact.content).status_code in (200, 201)
            answer = complete(two, "tone")
            assert answer.status_code == 200
            assert two.get("/v1/prompts/tone").json()["version"] == artifact.version
            assert artifact.version in answer.text, number
        assert one.delete("/v1/prompts/tone").status_code < 300
        assert complete(two, "tone").status_code == 404


def test_while_redis_is_away(replicas: list[Replica], redis: RedisServer, prompts: tuple[PromptArtifact, ...]) -> None:
    """Prompts in memory and the bare model are served without a fault; the rest is 503 with Retry-After, at once.

    What was deleted before is not served, what is not in memory is not guessed, and once Redis is back all works.
    """
    with client(replicas[0]) as one, client(replicas[1]) as two:
        for number, artifact in enumerate(prompts[:4]):
            one.put(f"/v1/prompts/p{number}", content=artifact.content)
        for name in ("p0", "p1"):
            assert complete(two, name).status_code == 200
        one.delete("/v1/prompts/p1")
        seen = num_looks(two)
        until(lambda: num_looks(two) > seen + 15)  # at three logs, at that of the names every fifth or sixth time
        assert complete(two, "p0").status_code == 200  # it may have heard of these changes amid the first
        for how, fresh in (("killed", "p2"), ("silent", "p3")):
            with away(redis, how):
                with pytest.raises(httpx.HTTPStatusError):
                    complete(two, fresh).raise_for_status()  # finds out that Redis is away
                times = []
                for _ in range(ROUNDS):
                    started = time.monotonic()
                    served = [complete(two, "p0"), complete(two, "tiny-llama")]
                    times.append(time.monotonic() - started)
                    assert [answer.status_code for answer in served] == [200, 200], served[0].text
                    assert prompts[0].version in served[0].text
                    for refused in (
                        complete(two, "p1"), complete(two, fresh), two.get("/v1/prompts"), two.delete("/v1/prompts/p0"),
                        two.put("/v1/prompts/new", content=prompts[4].content),
                    ):  # fmt: skip
                        assert refused.status_code == 503 and refused.json()["error"]["code"] == "store_unavailable"
                        assert int(refused.headers["retry-after"]) >= 1
                assert min(times) < 2 * GIVE_UP_SECONDS, times  # a pair that waits for Redis takes at least so long
                assert two.get("/readyz").json() == {"status": "ok", "store": "away"}  # as it told every caller above
                assert "promptd_store_up 0.0" in two.get("/metrics").text
            started = time.monotonic()
            until(lambda fresh=fresh: complete(two, fresh).status_code == 200, pause_seconds=0.02)  # type: ignore[misc]
            recovered = time.monotonic() - started
            assert complete(two, "p1").status_code == 404
            print(f"{how}: {2 * ROUNDS} served, slowest pair {max(times) * 1e3:.0f} ms, back after {recovered:.2f} s")


def test_control_without_memory_nothing_is_served(
    forge: ReplicaForge, redis: RedisServer, tmp_path: Path, prompts: tuple[PromptArtifact, ...]
) -> None:
    """With the memory for outages set to nothing the same request fails: it is the memory that serves it."""
    with (
        running_replicas(forge, tmp_path, redis.url, 1, outage_seconds=0) as (replica,),
        client(replica) as http,
    ):
        http.put("/v1/prompts/p0", content=prompts[0].content)
        assert complete(http, "p0").status_code == 200
        time.sleep(0.6)
        with away(redis, "killed"):
            assert complete(http, "p0").status_code == 503
            assert complete(http, "tiny-llama").status_code == 200


@pytest.mark.long
def test_a_minute_without_redis(
    forge: ReplicaForge, redis: RedisServer, tmp_path: Path, prompts: tuple[PromptArtifact, ...]
) -> None:
    """A server that read its tenants long ago serves them on, limits and all: under a key of its environment to the
    end, under an issued one for half a minute, since nobody could tell it that this one has ended."""
    static, admin_key = "the-key-of-globex", "the-key-of-the-admin"
    settings = {"admin_key": admin_key, "api_keys": f"globex:{static}"}
    limits = {"requests_per_minute": 600, "tokens_per_minute": 60_000, "max_concurrent_requests": 2}
    store = f"{redis.url}?socket_timeout={GIVE_UP_SECONDS}"
    with running_replicas(forge, tmp_path, store, 1, **settings) as (replica,), client(replica) as http:
        admin = {"Authorization": f"Bearer {admin_key}"}
        issued = http.post("/admin/keys", json={"tenant": "acme"}, headers=admin).raise_for_status().json()["key"]
        headers = {"acme": {"Authorization": f"Bearer {issued}"}, "globex": {"Authorization": f"Bearer {static}"}}
        for tenant, own in headers.items():
            http.patch(f"/admin/tenants/{tenant}", json=limits, headers=admin).raise_for_status()
            http.put("/v1/prompts/tone", content=prompts[0].content, headers=own).raise_for_status()

        def ask(tenant: str) -> int:
            body = {"model": "tone", "prompt": "the quick", "max_tokens": 2}
            return http.post("/v1/completions", json=body, headers=headers[tenant]).status_code

        began = time.monotonic()
        while time.monotonic() - began < LONG_AGO_SECONDS:
            assert [ask(tenant) for tenant in headers] == [200, 200]
            time.sleep(1)
        with away(redis, "killed"):
            began, seen = time.monotonic(), []
            while (seconds := time.monotonic() - began) < 2 * MAX_OUTAGE_SECONDS:
                seen.append((seconds, ask("acme"), ask("globex")))
                time.sleep(0.5)
        until(lambda: [ask(tenant) for tenant in headers] == [200, 200], pause_seconds=0.1)
    late = [one for one in seen if one[0] > MAX_OUTAGE_SECONDS]
    print(f"issued key: last served {max(at for at, status, _ in seen if status == 200):.0f} s after Redis was gone")
    assert {status for _, _, status in seen[1:]} == {200}  # the first request may find out that Redis is gone
    assert {status for at, status, _ in seen[1:] if at < MAX_OUTAGE_SECONDS - 5} == {200}
    assert {status for _, status, _ in late} == {503} and len(late) > 10
