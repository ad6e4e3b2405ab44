"""A server under mixed requests for an hour: nothing grows, and no budget is overrun."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from tests.bench.book import Book, Row
from tests.bench.models import folder_of, frozen
from tests.bench.rows import soft_prompts
from tests.bench.scale import Scale
from tests.bench.server import process_of, serving, train_and_ask

GROWTH_TARGET = 0.02
"""Of resident memory, from the middle third to the last; the first third fills caches."""
_NUM_SAMPLES, _NUM_JOBS, _VIRTUAL_TOKENS = 90, 12, 16
_TEXT_BYTES = 32 << 20
"""Of K/V of texts: so few that all pages are in use long before the first third is over."""
_SAMPLED = ("rss", "files", "threads", "prompt_bytes")


class _Traffic:
    """What a day brings, in turn: answers, streams, readers who leave, new versions, deletions, faults, jobs."""

    def __init__(self, http: httpx.Client, scale: Scale, hidden_size: int) -> None:
        self._http, self._rng = http, random.Random(0)
        self._names = [f"soak-{number}" for number in range(scale.num_soak_prompts)]
        pairs = (soft_prompts(2, _VIRTUAL_TOKENS, hidden_size) for _ in self._names)
        self._files = [(bytes(one.content), bytes(other.content)) for one, other in pairs]
        self._jobs = itertools.count()
        for name, (content, _) in zip(self._names, self._files, strict=True):
            http.put(f"/v1/prompts/{name}", content=content).raise_for_status()
        self._turns: list[Callable[[], None]] = [
            *[self._answer, self._stream, self._leave, self._several] * 4,
            self._publish,
            self._delete,
            self._fault,
        ]

    def turn(self) -> None:
        """One of them."""
        self._rng.choice(self._turns)()

    def train(self) -> None:
        """A job, and a request under its prompt."""
        train_and_ask(self._http, f"soak-job-{next(self._jobs)}")

    def _body(self, **more: object) -> dict[str, object]:
        words = " ".join(str(self._rng.randrange(1000)) for _ in range(self._rng.randint(2, 30)))
        return {"model": self._rng.choice(self._names), "prompt": words, "max_tokens": self._rng.randint(1, 24)} | more

    def _answer(self) -> None:
        self._http.post("/v1/completions", json=self._body()).raise_for_status()

    def _several(self) -> None:
        self._http.post("/v1/completions", json=self._body(n=4)).raise_for_status()

    def _stream(self) -> None:
        with self._http.stream("POST", "/v1/completions", json=self._body(stream=True)) as response:
            if not any(line == "data: [DONE]" for line in response.raise_for_status().iter_lines()):
                raise RuntimeError("a stream had no end")

    def _leave(self) -> None:
        with self._http.stream("POST", "/v1/completions", json=self._body(stream=True, max_tokens=100)) as response:
            next(response.raise_for_status().iter_lines())

    def _publish(self) -> None:
        at = self._rng.randrange(len(self._names))
        content = self._rng.choice(self._files[at])
        self._http.put(f"/v1/prompts/{self._names[at]}", content=content).raise_for_status()

    def _delete(self) -> None:
        at = self._rng.randrange(len(self._names))
        self._http.delete(f"/v1/prompts/{self._names[at]}").raise_for_status()
        self._http.put(f"/v1/prompts/{self._names[at]}", content=self._files[at][0]).raise_for_status()

    def _fault(self) -> None:
        for body, status in ((self._body(model="nobody"), 404), (self._body(max_tokens=-1), 400)):
            if (found := self._http.post("/v1/completions", json=body).status_code) != status:
                raise RuntimeError(f"{body} was answered with {found}")


def check_soak(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Resident memory, open files and threads of the server, third by third; and the bytes of resident prompts."""
    name = scale.latency_models[0]
    if len(book.series("soak/rss")) < _NUM_SAMPLES:
        for what in _SAMPLED:
            book.note(f"soak/{what}", [])
        _soak(scale, book, folder_of(name, root))
    taken = {what: book.series(f"soak/{what}") for what in _SAMPLED}
    third = _NUM_SAMPLES // 3
    middle, last = (
        {what: statistics.median(values[start : start + third]) for what, values in taken.items()}
        for start in (third, 2 * third)
    )
    growth, budget = last["rss"] / middle["rss"] - 1, book.fact("soak/budget")
    is_steady = all(last[what] <= middle[what] + 2 for what in ("files", "threads"))
    largest = max(taken["prompt_bytes"])
    return [
        Row(
            f"{scale.soak_seconds / 60:.0f} minutes of mixed requests ({book.fact('soak/turns'):,}), {name}",
            f"memory <= +{GROWTH_TARGET:.0%}, prompts within their budget",
            f"memory {growth:+.1%} ({last['rss'] / 1e6:.0f} MB), files {middle['files']:.0f} -> {last['files']:.0f}, "
            f"threads {middle['threads']:.0f} -> {last['threads']:.0f}; prompts up to {largest / budget:.0%} of theirs",
            growth <= GROWTH_TARGET and is_steady and largest <= budget,
        )
    ]


def _soak(scale: Scale, book: Book, folder: Path) -> None:
    model = frozen(folder)
    budget = model.bytes_per_slot * _VIRTUAL_TOKENS * max(2, scale.num_soak_prompts // 5)
    book.note("soak/budget", budget)
    limits = ("--prompt-cache-bytes", str(budget), "--kv-cache-bytes", str(_TEXT_BYTES), "--max-num-seqs", "8")
    with serving(folder, None, *limits) as (http, _):
        process, traffic = process_of(http), _Traffic(http, scale, model.spec.hidden_size)
        begun, turns = time.monotonic(), 0
        for number in range(_NUM_SAMPLES):
            if number % (_NUM_SAMPLES // _NUM_JOBS) == 0:
                traffic.train()
            until = begun + (number + 1) * scale.soak_seconds / _NUM_SAMPLES
            while True:
                traffic.turn()
                turns += 1
                time.sleep(scale.soak_pause_seconds)
                if time.monotonic() >= until:
                    break
            _sample(http, process, book)
        book.note("soak/turns", turns)


def _sample(http: httpx.Client, process: psutil.Process, book: Book) -> None:
    """Note what the server holds now."""
    read = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    book.add("soak/prompt_bytes", [float(read["promptd_prompt_cache_bytes"])])
    with process.oneshot():
        book.add("soak/rss", [process.memory_info().rss])
        book.add("soak/files", [process.num_fds()])
        book.add("soak/threads", [process.num_threads()])
