"""Servers over one real Redis: how much two behind HAProxy serve more than one, and how long a publication takes."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import torch
from promptd_store import BaseModelSpec, encode

from tests.bench.book import Book, Row, paired_ratio
from tests.bench.models import folder_of, frozen
from tests.bench.scale import Scale
from tests.bench.server import serving
from tests.haproxy import running_haproxy
from tests.overload.wire import ask
from tests.redis_server import running_redis
from tests.replicas import ReplicaForge, running_replicas

ROWS = 8
CLIENTS = 4 * ROWS
"""Twice the rows of both servers: each has the next request when a row is free."""
REPLICAS_TARGET, PUBLISH_TARGET_MS = 1.8, 60.0
NUM_NAMES = 50


@dataclass
class Pair:
    """One server and two, by their number, in alternating rounds."""

    rates: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    """Answers a second."""
    cores: dict[int, list[dict[str, float]]] = field(default_factory=lambda: {1: [], 2: []})
    """Cores in use, by whom."""
    answered: dict[int, list[int]] = field(default_factory=dict)
    """How many requests each server has answered in the last round."""


def measure_replicas(forge: ReplicaForge, folder: Path, scale: Scale, model_seconds: float | None) -> Pair:
    """Ask one server and two through the shipped HAProxy; the model sleeps so long in each step, None: it works."""
    found = Pair()
    with (
        running_redis(folder / "redis") as redis,
        running_replicas(forge, folder, redis.url, max_num_seqs=ROWS, traits=_traits(model_seconds)) as replicas,
        running_haproxy(folder / "one", [replicas[0].port]) as one,
        running_haproxy(folder / "two", [replica.port for replica in replicas]) as two,
    ):
        pids = {f"server {number}": replica.pid for number, replica in enumerate(replicas, 1)}
        pids |= {"Redis": redis.process.pid if redis.process else None}
        for number in range(scale.num_fleet_rounds):
            for count, proxy in ((1, one), (2, two)) if number % 2 else ((2, two), (1, one)):
                processes = {name: psutil.Process(pid) for name, pid in {**pids, "HAProxy": proxy.process.pid}.items()}
                before = [_num_finished(replica.url) for replica in replicas]
                rate, cores = asyncio.run(_drive(proxy.url, forge.model.name, scale, processes))
                after = [_num_finished(replica.url) for replica in replicas]
                found.rates[count].append(rate)
                found.cores[count].append(cores)
                found.answered[count] = [now - had for now, had in zip(after, before, strict=True)]
    return found


def _traits(model_seconds: float | None) -> dict[str, float]:
    return {} if model_seconds is None else {"model_seconds": model_seconds}


async def _drive(
    url: str, model: str, scale: Scale, processes: Mapping[str, psutil.Process]
) -> tuple[float, dict[str, float]]:
    """Keep so many requests open for a while; return answers a second and cores in use, by this process too."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": scale.fleet_tokens, "ignore_eos": True, "temperature": 0}
    port, num_done, is_over = urlsplit(url).port or 0, 0, False

    async def client() -> None:
        nonlocal num_done
        while not is_over:
            reply = await ask(port, body)
            if reply.status != 200:
                raise RuntimeError(f"answered {reply.status}: {reply.body[:200]!r}")
            num_done += 1

    clients = asyncio.gather(*(client() for _ in range(CLIENTS)))
    await asyncio.sleep(scale.fleet_seconds / 4)
    began, before, had = time.perf_counter(), _cpu_seconds(processes), num_done
    await asyncio.sleep(scale.fleet_seconds)
    seconds, after, done = time.perf_counter() - began, _cpu_seconds(processes), num_done - had
    is_over = True
    await clients
    return done / seconds, {name: (after[name] - before[name]) / seconds for name in before}


def _cpu_seconds(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    used = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    return {**used, "load generator": time.process_time()}


def _num_finished(url: str) -> int:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return int(float(next(line.split()[1] for line in lines if 'requests_total{outcome="finished"}' in line)))


def check_replicas(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Two servers against one: with a model of fixed step time, and with a real one, whose cores they share."""
    real = scale.latency_models[0]
    sleeper = f"a model that sleeps {1e3 * scale.fleet_step_seconds:g} ms a step"
    return [
        _compared(scale, book, root, sleeper, "tiny", scale.fleet_step_seconds),
        _compared(scale, book, root, real, real, None),
    ]


def _compared(scale: Scale, book: Book, root: Path, label: str, name: str, model_seconds: float | None) -> Row:
    key = f"replicas/{label}"
    if book.fact(key) is None:
        with _forged(folder_of(name, root)) as (forge, folder):
            found = measure_replicas(forge, folder, scale, model_seconds)
        cores = {who: statistics.median(one[who] for one in found.cores[2]) for who in found.cores[2][0]}
        rates = {f"rate_{count}": statistics.median(rates) for count, rates in found.rates.items()}
        book.note(key, {"ratio": paired_ratio(found.rates[2], found.rates[1]), "cores": cores, **rates})
    fact = book.fact(key)
    cores_in_use = ", ".join(f"{who} {used:.2f}" for who, used in fact["cores"].items())
    return Row(
        f"two servers : one behind HAProxy, {label}",
        "" if model_seconds is None else f">= {REPLICAS_TARGET:g}",
        f"{fact['ratio']:.2f} ({fact['rate_2']:.1f} : {fact['rate_1']:.1f} requests/s; cores in use: {cores_in_use})",
        None if model_seconds is None else fact["ratio"] >= REPLICAS_TARGET,
    )


def measure_publishes(http: httpx.Client, spec: BaseModelSpec, scale: Scale) -> list[float]:
    """Publish new versions on a server, one after the other; return the milliseconds of each."""
    times, content = [], b""
    num_tokens = scale.publish_bytes // (4 * spec.hidden_size)
    for number in range(scale.num_publishes):
        vectors = 0.1 * torch.randn(num_tokens, spec.hidden_size, generator=torch.Generator().manual_seed(number))
        content = encode("soft", vectors, base_fingerprint=spec.fingerprint).content
        began = time.perf_counter()
        answer = http.put(f"/v1/prompts/p{number % NUM_NAMES}", content=content)
        times.append(1e3 * (time.perf_counter() - began))
        answer.raise_for_status()
    stored = http.get(f"/v1/prompts/p{(scale.num_publishes - 1) % NUM_NAMES}/content").content
    if stored != content:
        raise RuntimeError("what was published last is not what is stored")
    return times


def check_publish(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Publications through a whole server: a trial, then bytes, pointer and log of calls, each synced to the disk."""
    name = scale.latency_models[0]
    rows = []
    for label, started in ((f"tried on {name}", _as_users_do), ("whose trial takes no time", _without_a_model)):
        key, model = f"publish/{label}", folder_of(name, root)
        if not book.series(key):
            with started(model) as http:
                book.add(key, measure_publishes(http, frozen(model).spec, scale))
        times = book.series(key)
        median, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
        rows.append(
            Row(
                f"publication of {scale.publish_bytes / 1000:g} kB over HTTP, `appendfsync always`, {label}",
                f"p99 <= {PUBLISH_TARGET_MS:g} ms",
                f"p99 {p99:.0f} ms, median {median:.0f} ms ({len(times)} publications)",
                p99 <= PUBLISH_TARGET_MS,
            )
        )
    return rows


@contextlib.contextmanager
def _as_users_do(model: Path) -> Iterator[httpx.Client]:
    """`promptd serve` over a Redis, with as many threads as all that is measured."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_redis(Path(folder)) as redis,
        serving(model, redis.url) as (http, _),
    ):
        yield http


@contextlib.contextmanager
def _without_a_model(model: Path) -> Iterator[httpx.Client]:
    """The same with a model whose passes take no time."""
    with (
        _forged(model) as (forge, folder),
        running_redis(folder / "redis") as redis,
        running_replicas(forge, folder, redis.url, 1, traits=_traits(0.0)) as (server,),
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield http


@contextlib.contextmanager
def _forged(model: Path) -> Iterator[tuple[ReplicaForge, Path]]:
    forge = ReplicaForge(model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield forge, Path(folder)
    finally:
        forge.close()
