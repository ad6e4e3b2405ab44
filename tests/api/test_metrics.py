"""`/metrics` against what a client saw: every exchange, every token, and no more series than there may be."""

from __future__ import annotations

import concurrent.futures
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from promptd.api.routes import ROUTES
from promptd.collectors import EngineCollector
from promptd.engine.async_engine import AsyncEngine
from promptd.engine.request import GenerateRequest
from promptd.engine.share import Share
from promptd.metrics import MAX_CODES, OVERLOAD_CODES, HttpMetrics, TokenGaps
from promptd.settings import Settings
from promptd.tenancy import UsageLedger
from tests.api.conftest import LiveServer, serve
from tests.api.training_server import TrainingServer
from tests.engine.harness import greedy, make_engine
from tests.patience import until

MAX_SERIES = 5000
NUM_REQUESTS, NUM_CLIENTS = 120, 8
Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(text: str) -> Series:
    """Every series of a scrape."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def grown(before: Series, after: Series, name: str, **labels: str) -> float:
    """By how much the series with these labels grew together."""
    wanted = set(labels.items())
    return sum(value - before.get(key, 0.0) for key, value in after.items() if key[0] == name and wanted <= key[1])


@dataclass
class Log:
    """What one client noted."""

    exchanges: Counter[tuple[str, int]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    generations: int = 0

    def __add__(self, other: Log) -> Log:
        return Log(
            self.exchanges + other.exchanges,
            self.codes + other.codes,
            self.read + other.read,
            self.written + other.written,
            self.generations + other.generations,
        )


def one_client(url: str, seed: int) -> Log:
    """Ask a share of the requests: whole, streamed, several at once, labels, and wrong ones."""
    draw, log = random.Random(seed), Log()
    with httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(NUM_REQUESTS // NUM_CLIENTS):
            kind = draw.choice(("whole", "stream", "several", "labels", "unknown", "bad", "field"))
            prompt = draw.choice(("p0", "p1", "p2", "p4"))
            body = {
                "model": prompt,
                "prompt": " ".join(["the quick fox"] * draw.randint(1, 4)),
                "max_tokens": draw.randint(1, 6),
                "ignore_eos": True,
            }
            if kind == "unknown":
                body["model"] = "nobody"
            elif kind == "bad":
                body["max_tokens"] = -1
            elif kind == "field":
                body["max_words"] = 9
            elif kind == "several":
                body |= {"n": 3, "temperature": 1.0}
            elif kind == "stream":
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            path = "/v1/completions"
            if kind == "labels":
                path, body = "/v1/classify", {"model": prompt, "input": "the fox", "labels": [" yes", " no"]}
            reply = http.post(path, json=body)
            log.exchanges[path, reply.status_code] += 1
            if reply.status_code != 200:
                log.codes[reply.json()["error"]["code"]] += 1
                continue
            usage = json.loads(reply.text.split("data: ")[-2])["usage"] if kind == "stream" else reply.json()["usage"]
            num_choices = 3 if kind == "several" else 1
            log.read += usage["prompt_tokens"] * num_choices  # each of them is a row of its own
            log.written += usage["completion_tokens"]
            log.generations += num_choices if kind != "labels" else 0
    return log


def test_a_load_is_counted_to_the_last_token(server: LiveServer) -> None:
    """What eight clients noted together is exactly what the counters grew by."""
    with server.http() as http:
        before = scrape(http.get("/metrics").text)
        with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
            logs = list(pool.map(lambda seed: one_client(server.url, seed), range(NUM_CLIENTS)))
        log = sum(logs, Log())
        assert {status for _, status in log.exchanges} == {200, 400, 404}

        def is_counted() -> bool:  # each exchange behind its last byte
            now = scrape(http.get("/metrics").text)
            return all(
                grown(before, now, "promptd_http_requests_total", route=path, status=str(status)) == count
                for (path, status), count in log.exchanges.items()
            )

        until(is_counted, "the server counts what the clients did", pause_seconds=0.05)
        after = scrape(http.get("/metrics").text)
        rejected = {
            dict(labels)["code"]: int(grown(before, after, name, **dict(labels)))
            for name, labels in after
            if name == "promptd_requests_rejected_total"
        }
    assert set(log.codes) == {"model_not_found", "invalid_value", "unknown_field"}
    assert {code: num for code, num in rejected.items() if num} == log.codes
    for path in {path for path, _ in log.exchanges}:
        num = sum(count for (one, _), count in log.exchanges.items() if one == path)
        assert grown(before, after, "promptd_http_request_seconds_count", route=path) == num
    assert grown(before, after, "promptd_generation_tokens_total") == log.written
    assert grown(before, after, "promptd_prompt_tokens_total") == log.read
    gaps = grown(before, after, "promptd_inter_token_latency_seconds_count")
    assert gaps == log.written - log.generations, "one between two tokens"
    rows = log.generations + log.exchanges["/v1/classify", 200]
    assert grown(before, after, "promptd_requests_total", outcome="finished") == rows
    assert grown(before, after, "promptd_requests_total") == rows
    hits, misses = (grown(before, after, f"promptd_prompt_cache_{kind}_total") for kind in ("hits", "misses"))
    assert hits + misses == rows, "every row asked for one prompt"
    for name in ("time_to_first_token", "request", "request_queue", "request_prefill", "request_decode"):
        assert grown(before, after, f"promptd_{name}_seconds_count") == log.generations, name


def test_times_between_tokens_are_a_histogram_as_any_other() -> None:
    """What a scrape shows of them is what Prometheus' own histogram shows."""
    registry, other = CollectorRegistry(), CollectorRegistry()
    gaps = TokenGaps()
    registry.register(gaps)
    empty = scrape(generate_latest(registry).decode())
    bounds = sorted(float(dict(labels)["le"]) for name, labels in empty if name.endswith("_bucket"))
    oracle = Histogram("promptd_inter_token_latency_seconds", "the same", buckets=bounds, registry=other)
    for seconds in (0.0, bounds[0], 0.003, 0.02, 0.02, bounds[-2], 3600.0):
        gaps.observe(seconds)
        oracle.observe(seconds)
    shown = scrape(generate_latest(registry).decode())
    assert shown == scrape(generate_latest(other).decode()) != empty


def test_the_gap_between_tenants_that_wait(tiny_models: dict[str, Path]) -> None:
    """It is the difference of what the two have had; a tenant that waits alone has no gap to anybody."""
    engine = make_engine(tiny_models["llama"], max_num_seqs=1)
    for number, tenant in enumerate(("a", "b", "b", "a", "a")):
        text = tuple(range(5, 15 + number))
        engine.add_request(GenerateRequest(f"{number}", text, greedy(4), share=Share(tenant), salt=tenant))
    collector = EngineCollector(AsyncEngine(engine))
    gaps = set()
    while engine.has_work:
        engine.step()
        (gap,) = [sample for family in collector.collect() for sample in family.samples if "fairness" in sample.name]
        lines = engine.scheduler.waiting
        waiting = lines.waiting_shares()
        had = sorted(lines.service(tenant) for tenant in waiting)
        assert gap.value == (had[-1] - had[0] if had else 0)
        gaps.add((len(waiting), gap.value > 0))
    assert gaps >= {(2, True), (1, False), (0, False)}


def test_series_do_not_grow_with_tenants_and_prompts(trainer: TrainingServer) -> None:
    """After one use of everything, more tenants, prompts, files and wrong addresses add no series."""

    def use(number: int) -> None:
        with trainer.http() as http, trainer.http("admin") as admin:
            assert http.put(f"/v1/prompts/t{number}", json={"text": f"number {number}"}).status_code == 201
            body = {"model": f"t{number}", "prompt": "the", "max_tokens": 2}
            assert http.post("/v1/completions", json=body).status_code == 200
            key = admin.post("/admin/keys", json={"tenant": f"tenant-{number}"}).json()["key"]
            own = {"Authorization": f"Bearer {key}"}
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=own).status_code == 200
            assert http.get(f"/nowhere/{number}").status_code == 404
            assert http.request(f"VERB{number}", "/v1/models").status_code == 405
            assert http.delete(f"/v1/prompts/t{number}").status_code == 200

    with trainer.http() as http:
        http.get("/metrics")
        for number in range(3):
            use(number)
        before = set(scrape(http.get("/metrics").text))
        for number in range(3, 9):
            use(number)
        after = set(scrape(http.get("/metrics").text))
    assert after == before
    named = [key for key in after if "tenant" in str(key[1]).replace("erase_tenant", "")]
    assert not named, "the scrape is open: it names no tenant"


def test_there_are_never_more_series_than_may_be(server: LiveServer) -> None:
    """Every route with every status that any of them has ever answered, and all else beside it."""
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    statuses = (0, 200, 201, 204, 207, 304, 307, 400, 401, 403, 404, 405, 409, 412, 413, 422, 428, 429, 500, 503, 504)
    for route in ROUTES:
        for status in statuses:
            metrics.observe(route.method, route.path, status, 0.1)
    for number in range(2 * MAX_CODES):
        metrics.observe("GET", "/livez", 400, 0.1, f"code-{number}")
    most = len(scrape(generate_latest(registry).decode()))
    with server.http() as http:
        others = [key for key in scrape(http.get("/metrics").text) if not key[0].startswith("promptd_http_")]
    codes = {dict(labels)["code"] for name, labels in scrape(generate_latest(registry).decode()) if "rejected" in name}
    assert len(codes) == MAX_CODES + 1 and codes >= {"other", *OVERLOAD_CODES}
    assert most + len(others) <= MAX_SERIES


def test_store_calls_are_timed_and_failures_counted(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A publication shows as a transaction and a blob; a blob that is damaged counts as a failure of the store."""
    folder = tiny_models["llama"]
    settings = Settings(model=str(folder), store=str(tmp_path), artifact_cache_bytes=0, training="off", drain_seconds=0)
    with serve(settings, folder) as live, live.http() as http:
        before = scrape(http.get("/metrics").text)
        assert http.put("/v1/prompts/text", json={"text": "the quick"}).status_code == 201
        after = scrape(http.get("/metrics").text)
        for operation in ("transact", "put_blob"):
            assert grown(before, after, "promptd_store_seconds_count", operation=operation) >= 1
        assert grown(before, after, "promptd_store_failures_total") == 0
        (blob,) = [path for path in tmp_path.rglob("*") if path.is_file() and len(path.name) == 64]
        blob.write_bytes(b"damage")
        reply = http.post("/v1/completions", json={"model": "text", "prompt": "a", "max_tokens": 1})
        assert reply.status_code == 500
        last = scrape(http.get("/metrics").text)
        assert grown(after, last, "promptd_store_failures_total", operation="get_blob") == 1


def test_what_nobody_foresaw_is_counted_and_named(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the server's own: a 500 with the request's id, its code and nothing of the fault, counted as one."""

    async def fail(*args: object) -> None:
        raise ValueError("a secret")

    def told(http: httpx.Client) -> list[float]:
        found = scrape(http.get("/metrics").text)
        exchanges = [
            grown({}, found, "promptd_http_requests_total", route="/v1/usage", status=status) for status in ("500", "0")
        ]
        return [*exchanges, grown({}, found, "promptd_requests_rejected_total", code="internal_error")]

    monkeypatch.setattr(UsageLedger, "read", fail)
    with server.http() as http, capture_logs():  # without a configuration, tracebacks with all their values are drawn
        before = told(http)
        reply = http.get("/v1/usage", headers={"X-Request-Id": "mine"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert reply.headers["X-Request-Id"] == "mine" and "secret" not in reply.text
        until(lambda: told(http) != before, "the server counts it")
        assert [now - then for then, now in zip(before, told(http), strict=True)] == [1, 0, 1]
