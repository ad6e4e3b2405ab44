"""What HTTP, metrics and traces add to the engine: the same requests to its bare loop and to a server, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import httpx

from promptd.bench import Lengths, Workload
from promptd.bench.report import Sample
from promptd.bench.workload import BenchPrompt, BenchRequest, make_requests
from promptd.engine.engine import Engine
from promptd.engine.request import RequestOutput
from tests.bench.book import Book, Row
from tests.bench.lean_client import LeanClient, lean_client
from tests.bench.models import folder_of, frozen
from tests.bench.rows import make_engine, request
from tests.bench.scale import Scale
from tests.bench.server import process_of, serving
from tests.collector import Collector

FIRST_TARGET_MS, TOKEN_TARGET = 5.0, 0.05
ENGINE, SERVER, TRACED = "engine", "server", "server, traced"


class _Target(Protocol):
    def answers(self, requests: Sequence[BenchRequest], concurrency: int) -> list[Sample]:
        """Have all answered, so many at once."""


class _BareLoop:
    """`step()` again and again, and nothing else."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def answers(self, requests: Sequence[BenchRequest], concurrency: int) -> list[Sample]:
        """Have all answered, so many at once."""
        todo, samples = iter(requests), dict[str, Sample]()

        def begin(todo: Iterator[BenchRequest]) -> None:
            if (one := next(todo, None)) is not None:
                asked = request(one.token_ids, one.max_tokens)
                samples[asked.request_id] = Sample(time.perf_counter())
                self._engine.add_request(asked)

        for _ in range(concurrency):
            begin(todo)
        while self._engine.has_work:
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.error is not None or not isinstance(output, RequestOutput):
                    raise RuntimeError(f"a row failed: {output.error}")
                samples[output.request_id].token_times += [now] * len(output.token_ids)
                if output.is_last:
                    begin(todo)
        return list(samples.values())


class _Server:
    """A server and its client, each in a process of its own."""

    def __init__(self, client: LeanClient, http: httpx.Client) -> None:
        self._client = client
        self._port = http.base_url.port or 80
        self._process = process_of(http).pid
        self.loop_seconds = self.client_seconds = 0.0
        """CPU time of the server's event loop and of the client, for the answers so far."""

    def answers(self, requests: Sequence[BenchRequest], concurrency: int) -> list[Sample]:
        """Have all answered, so many at once."""
        asked = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
        bodies = [asked | {"prompt": one.token_ids, "max_tokens": one.max_tokens} for one in requests]
        before = self._read_loop()
        samples, seconds = self._client.ask(self._port, bodies, concurrency)
        self.loop_seconds += self._read_loop() - before
        self.client_seconds += seconds
        return samples

    def _read_loop(self) -> float:
        """Return the seconds that the process's first thread has run, which is the one of the event loop."""
        return 1e-9 * int(Path(f"/proc/{self._process}/task/{self._process}/schedstat").read_text().split()[0])


def check_http_path(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Time to the first token and between tokens through HTTP, with traces and without, against the engine's own."""
    rows = []
    for name in scale.latency_models:
        counts = scale.path_rows if name in scale.many_rows_models else scale.path_rows[:2]
        key = f"http_path/{name}"
        missing = scale.num_path_rounds - len(book.series(f"{key}/{counts[-1]}/{TRACED}/first_ms"))
        if missing > 0:
            folder, sizes = folder_of(name, root), ("--max-num-seqs", str(counts[-1]))
            with Collector() as collector:
                with (
                    serving(folder, None, *sizes) as (plain, _),
                    serving(folder, None, *sizes, "--traces", collector.url) as (traced, _),
                    lean_client() as client,
                ):
                    servers = {SERVER: _Server(client, plain), TRACED: _Server(client, traced)}
                    _rounds(scale, book, key, folder, servers, counts, missing)
                if "decode" not in collector.names():
                    raise RuntimeError("no trace has come by the server's end: tracing was not on")
        rows += [_row(book, f"{key}/{count}", name, count, label) for label in (TRACED, SERVER) for count in counts]
    return rows


def _rounds(
    scale: Scale,
    book: Book,
    key: str,
    folder: Path,
    servers: dict[str, _Server],
    counts: Sequence[int],
    num_rounds: int,
) -> None:
    model = frozen(folder)
    longest = counts[-1] * 2 * (scale.input_tokens + scale.output_tokens)
    engine = make_engine(model, max_num_seqs=counts[-1], text_tokens=2 * longest, prompt_tokens=64, prefix_caching=True)
    targets: dict[str, _Target] = {ENGINE: _BareLoop(engine), **servers}
    for number in range(num_rounds + 1):
        for count in counts:
            order = list(targets)[number % 3 :] + list(targets)[: number % 3]
            for place, label in enumerate(order):  # everyone gets texts of its own, so that none is in a cache
                run = 3 * (number * len(counts) + counts.index(count)) + place
                target = targets[label]
                before = (target.loop_seconds, target.client_seconds) if isinstance(target, _Server) else (0.0, 0.0)
                requests = _requests(scale, count, model.spec.vocab_size, run)
                samples = target.answers(requests, count)
                num_tokens = sum(len(one.token_times) for one in samples)
                if num_tokens != sum(one.max_tokens for one in requests):
                    raise RuntimeError(f"{num_tokens} tokens came, others were asked for")
                if not number:  # the first warms up
                    continue
                first, token, rate = _times(samples)
                book.add(f"{key}/{count}/{label}/first_ms", [first])
                book.add(f"{key}/{count}/{label}/token_ms", [token])
                book.add(f"{key}/{count}/{label}/tokens_per_second", [rate])
                if isinstance(target, _Server):
                    after = (target.loop_seconds, target.client_seconds)
                    for who, then, now in zip(("loop", "client"), before, after, strict=True):
                        book.add(f"{key}/{count}/{label}/{who}_us", [1e6 * (now - then) / num_tokens])


def _requests(scale: Scale, count: int, vocab_size: int, run: int) -> list[BenchRequest]:
    """Answers of various lengths: rows leave and come one by one, while the others go on."""
    text, half = Lengths(scale.input_tokens, scale.input_tokens), scale.output_tokens // 2
    asked = Workload(
        num_requests=max(2 * count, 6), input_tokens=text, output_tokens=Lengths(half, 2 * half), concurrency=count
    )
    return make_requests(asked, [BenchPrompt(None, "none")], vocab_size, run=run)


def _times(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Median milliseconds to the first token, and a token behind it; tokens a second of all."""
    times = [(one.started, one.token_times[0], one.token_times[-1], len(one.token_times) - 1) for one in samples]
    first = statistics.median(first - started for started, first, _, _ in times)
    token = statistics.median((last - first) / more for _, first, last, more in times)
    whole = max(last for _, _, last, _ in times) - min(started for started, _, _, _ in times)
    return 1e3 * first, 1e3 * token, sum(more + 1 for _, _, _, more in times) / whole


def _row(book: Book, key: str, name: str, count: int, label: str) -> Row:
    def series(who: str, what: str) -> list[float]:
        return book.series(f"{key}/{who}/{what}")

    def pairs(what: str) -> list[tuple[float, float]]:
        return list(zip(series(ENGINE, what), series(label, what), strict=True))

    added = statistics.median(mine - bare for bare, mine in pairs("first_ms"))
    share = statistics.median(mine / bare for bare, mine in pairs("token_ms")) - 1
    rate = statistics.median(mine / bare for bare, mine in pairs("tokens_per_second"))
    first, token = (
        " : ".join(f"{statistics.median(series(who, what)):.{digits}f}" for who in (label, ENGINE))
        for what, digits in (("first_ms", 1), ("token_ms", 2))
    )
    loop, client = (statistics.median(series(label, f"{who}_us")) for who in ("loop", "client"))
    is_target = label == TRACED and count <= 32
    return Row(
        f"what HTTP and metrics{' and traces' * (label == TRACED)} add to the engine, {count} rows, {name}",
        f"<= {FIRST_TARGET_MS:g} ms, <= {TOKEN_TARGET:.0%} a token" if is_target else "",
        f"{added:+.1f} ms to the first token ({first}), {share:+.1%} a token ({token} ms), {rate:.2f} x its tokens/s; "
        f"CPU a token: event loop {loop:.0f} us, client {client:.0f} us ({len(series(ENGINE, 'first_ms'))} rounds)",
        (added <= FIRST_TARGET_MS and share <= TOKEN_TARGET) if is_target else None,
    )
