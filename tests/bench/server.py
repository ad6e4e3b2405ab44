"""The server as a process: how long until it is ready, what a resident prompt adds over HTTP, and how soon a trained
prompt answers."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import torch

from promptd.demo import DEMO_MODEL_PATH
from tests.bench.book import Book, Row
from tests.bench.latency import TEXT_TOKENS
from tests.bench.models import folder_of, frozen
from tests.bench.rows import Tokens, fresh_tokens, soft_prompts
from tests.bench.scale import Scale
from tests.ports import free_port

READY_TARGET_SECONDS = 8.0
AFTER_JOB_TARGET_MS = 100.0
_LIMIT_SECONDS = 120.0


@contextlib.contextmanager
def serving(model: Path, store: Path | str | None = None, *arguments: str) -> Iterator[tuple[httpx.Client, float]]:
    """Start `promptd serve`, without --model for the embedded model, over a store of its own unless there is one.

    Yields (client, seconds until it was ready).
    """
    port = free_port()
    command = [sys.executable, "-m", "promptd", "serve", "--port", str(port)]
    if model != DEMO_MODEL_PATH:
        command += ["--model", str(model)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMPTD_")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with (
        tempfile.TemporaryDirectory() as own,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
        tempfile.TemporaryFile() as log,
    ):
        began = time.perf_counter()
        command += ["--store", str(store or own), *arguments]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _is_ready(http):
                if server.poll() is not None or time.perf_counter() - began > _LIMIT_SECONDS:
                    log.seek(0)
                    raise RuntimeError(f"promptd serve did not start:\n{log.read().decode()}")
                time.sleep(0.02)
            yield http, time.perf_counter() - began
        finally:
            server.terminate()
            server.wait(timeout=60)


def process_of(http: httpx.Client) -> psutil.Process:
    """Return the process that listens where the client asks, on this machine."""
    port = http.base_url.port or 80
    listening = (one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
    return psutil.Process(next(one.pid for one in listening if one.laddr.port == port))


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").is_success
    except httpx.TransportError:
        return False


def check_ready(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Seconds from the command to a server that takes requests, files in the page cache."""
    name = scale.latency_models[0]
    model = folder_of(name, root)
    missing = scale.num_starts - len(book.series("ready/seconds"))
    for number in range(missing + 1 if missing > 0 else 0):
        with serving(model) as (_, seconds):
            if number:  # the first start warms the disk
                book.add("ready/seconds", [seconds])
    seconds = statistics.median(book.series("ready/seconds"))
    label = "the demo model" if model == DEMO_MODEL_PATH else f"{name} (random weights)"
    shown = f"{seconds:.1f} s (median of {len(book.series('ready/seconds'))})"
    target = f"<= {READY_TARGET_SECONDS:g} s"
    return [Row(f"`promptd serve` ready with {label}", target, shown, seconds <= READY_TARGET_SECONDS)]


def check_http(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Time to the first event of a stream, with a resident prompt less without one, in alternating pairs."""
    name = scale.latency_models[0]
    folder = folder_of(name, root)
    missing = scale.num_latency_pairs - len(book.series("http/with_ms"))
    if missing > 0:
        spec = frozen(folder).spec
        (prompt,) = soft_prompts(1, scale.virtual_tokens, spec.hidden_size)

        def once(http: httpx.Client, is_named: bool) -> float:
            return first_event(http, fresh_tokens(TEXT_TOKENS, spec.vocab_size), "bench" if is_named else None)

        with serving(folder) as (http, _):
            http.put("/v1/prompts/bench", content=prompt.content).raise_for_status()
            for warm in range(10):
                once(http, warm % 2 == 0)
            for number in range(missing):
                order = (True, False) if number % 2 else (False, True)
                times = {named: once(http, named) for named in order}
                book.add("http/with_ms", [times[True]])
                book.add("http/without_ms", [times[False]])
    mine, bare = book.series("http/with_ms"), book.series("http/without_ms")
    added = statistics.median(a - b for a, b in zip(mine, bare, strict=True))
    shown = f"{added:+.2f} ms ({statistics.median(mine):.2f} : {statistics.median(bare):.2f}, {len(mine)} pairs)"
    return [Row(f"the same over HTTP, store look-up included, {name}", "", shown)]


def first_event(http: httpx.Client, text: Tokens, prompt: str | None) -> float:
    """Return the milliseconds from sending a request for one token to the first event of its stream."""
    body = {"prompt": text, "max_tokens": 1, "temperature": 0, "stream": True}
    if prompt is not None:
        body["model"] = prompt
    first = None
    began = time.perf_counter()
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if first is None and line.startswith("data: "):
                first = time.perf_counter()
    if first is None:
        raise RuntimeError("the stream had no event")
    return 1e3 * (first - began)


def check_after_job(scale: Scale, book: Book, root: Path) -> list[Row]:
    """From the event that a job has succeeded to the first answer with its prompt, both over HTTP."""
    rows = []
    for name in scale.latency_models:
        key = f"after_job/{name}/ms"
        missing = scale.num_trained - len(book.series(key))
        if missing > 0:
            with serving(folder_of(name, root)) as (http, _):
                train_and_ask(http, "warm-up")
                for number in range(missing):
                    book.add(key, [train_and_ask(http, f"trained-{number}")])
        times = book.series(key)
        median, worst = statistics.median(times), max(times)
        rows.append(
            Row(
                f"job has succeeded -> first answer with its prompt, {name}",
                f"<= {AFTER_JOB_TARGET_MS:g} ms",
                f"{median:.1f} ms (worst of {len(times)}: {worst:.1f} ms)",
                worst <= AFTER_JOB_TARGET_MS,
            )
        )
    return rows


def train_and_ask(http: httpx.Client, name: str) -> float:
    """Train a prompt for two steps; return the milliseconds from its last event to its first token."""
    rows = [{"prompt": f"line {number}", "completion": " end"} for number in range(12)]
    body = {
        "suffix": name,
        "rows": rows,
        "method": {"type": "residual", "residual": {"hyperparameters": {"num_steps": 2, "batch_size": 4}}},
        "publish_worse": True,
    }
    job = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
    ended = None
    with http.stream("GET", f"/v1/fine_tuning/jobs/{job['id']}/events", params={"stream": True}) as response:
        for line in response.raise_for_status().iter_lines():
            if line.startswith("data: {"):
                event, ended = json.loads(line.removeprefix("data: ")), time.perf_counter()
    if ended is None or event["data"].get("state") != "succeeded":
        raise RuntimeError(f"the job of {name} ended otherwise: {event}" if ended else "the stream had no event")
    asked = {"model": name, "prompt": "line 1", "max_tokens": 1}
    http.post("/v1/completions", json=asked).raise_for_status()
    return 1e3 * (time.perf_counter() - ended)
