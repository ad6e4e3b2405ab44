"""Rounds in turn: promptd and as many peers as fit memory are loaded, one runs, the others are stopped."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from promptd.modeling import load_model
from tests.bench.book import Book, Row
from tests.bench.models import folder_of
from tests.bench.scale import Scale
from tests.bench.versus.contenders import CONTENDERS, OURS, PEERS, Contender, Running
from tests.bench.versus.environments import UnavailableError
from tests.bench.versus.targets import key_of, target_rows
from tests.bench.versus.workloads import Requests, Workload, workloads

_WARM_TOKENS = 4
_SPARE_BYTES, _WEIGHTS_FACTOR, _SMALL_BYTES = 3 << 30, 3, 1 << 26
"""The next contender is loaded where its weights, so many times, and so much more are free; a small model's always."""


def check_versus(scale: Scale, book: Book, root: Path) -> list[Row]:
    """All workloads, models and peers of the scale; what cannot be run here is noted with its reason."""
    for model in scale.versus_models:
        match = _Match(scale, book, root, model)
        while match.play():
            pass
    return target_rows(book, scale.versus_models)


class _Match:
    """One model."""

    def __init__(self, scale: Scale, book: Book, root: Path, model: str) -> None:
        self._scale, self._book, self._root, self._model = scale, book, root, model
        self._folder = folder_of(model, root)
        every = workloads(scale, self._folder)
        self._workloads = [each for name, each in every.items() if not scale.workloads or name in scale.workloads]
        names = scale.peers or [peer.name for peer in PEERS]
        self._peers = [CONTENDERS[name] for name in names if name != OURS.name]  # it runs beside each of them
        self._spec = load_model(self._folder).spec
        self._absent: set[str] = set()
        self._weights = sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))

    def _missing(self, workload: Workload, peer: Contender) -> int:
        """Rounds that are to be run."""
        key = key_of(self._model, workload.name, peer.name)
        if not workload.suits(peer) or self._book.fact(f"{key}/failed") is not None:
            return 0
        return self._scale.versus_rounds - len(self._book.series(f"{key}/ours"))

    def play(self) -> bool:
        """Load a group, run what is missing of it, close it; False where nothing was missing."""
        todo = [
            peer
            for peer in self._peers
            if peer.name not in self._absent and any(self._missing(each, peer) > 0 for each in self._workloads)
        ]
        if not todo:
            return False
        loaded: dict[str, Running] = {}
        try:
            self._load(OURS, loaded)
            for peer in todo:
                if len(loaded) > 1 and psutil.virtual_memory().available < self._need():
                    break
                try:
                    self._load(peer, loaded)
                except UnavailableError as reason:
                    print(f"    {peer.name}: {reason}", flush=True)
                    self._absent.add(peer.name)
                    self._book.note(f"versus/{self._model}/{peer.name}/absent", str(reason))
            for workload in self._workloads:
                self._rounds(workload, loaded)
                self._note_memory(loaded)
        finally:
            for running in loaded.values():
                running.close()
        return True

    def _need(self) -> int:
        """Bytes that must be free before one more contender is loaded."""
        return _SPARE_BYTES * (self._weights > _SMALL_BYTES) + _WEIGHTS_FACTOR * self._weights

    def _load(self, contender: Contender, loaded: dict[str, Running]) -> None:
        print(f"    loading {contender.name}, {self._model}", flush=True)
        running = contender.start(self._folder, self._root, torch.get_num_threads())
        running.pause()
        loaded[contender.name] = running
        self._book.note(f"versus/{self._model}/{contender.name}/absent", None)
        self._book.add(f"versus/{self._model}/{contender.name}/start_seconds", [running.start_seconds])

    def _note_memory(self, loaded: dict[str, Running]) -> None:
        for name, running in loaded.items():
            key = f"versus/{self._model}/{name}/peak_bytes"
            self._book.note(key, max(running.peak_bytes() or 0, self._book.fact(key) or 0))

    def _rounds(self, workload: Workload, loaded: dict[str, Running]) -> None:
        missing = {name: self._missing(workload, CONTENDERS[name]) for name in loaded if name != OURS.name}
        for number in range(max(missing.values(), default=0)):
            names = [OURS.name, *(name for name, left in missing.items() if left > number and name in loaded)]
            prompts = workload.prompts(self._spec, self._root / "prompts" / self._model, number)
            requests = workload.requests(self._spec.vocab_size, prompts, number)
            found = {}
            for name in names if number % 2 else reversed(names):
                try:
                    if prompts and (number == 0 or workload.has_new_prompts):
                        self._ask(loaded[name], "prompts", files=prompts)
                    if number == 0 and not workload.has_new_prompts:
                        self._warm(loaded[name], workload, prompts)
                    found[name] = self._run(loaded[name], workload, requests)
                except RuntimeError as reason:
                    if name == OURS.name:
                        raise
                    print(f"    {name}: {reason}", flush=True)
                    self._book.note(f"{key_of(self._model, workload.name, name)}/failed", str(reason))
                    loaded.pop(name).close()
            self._note(workload, requests, found)

    def _warm(self, running: Running, workload: Workload, prompts: dict[str, str]) -> None:
        """Send other texts under the same prompts, so that no cache of texts has seen those that count."""
        warm = workload.requests(self._spec.vocab_size, prompts, -1)
        short = [{**each, "max_tokens": min(each["max_tokens"], _WARM_TOKENS)} for each in warm]
        self._run(running, workload, short)

    def _run(self, running: Running, workload: Workload, requests: Requests) -> Any:
        asked = self._share(running.name, requests)
        found = self._ask(running, "run", requests=asked, concurrency=workload.concurrency)
        expected, got = [each["max_tokens"] for each in asked], [len(answer) for answer in found["answers"]]
        if expected != got:
            raise RuntimeError(f"{running.name}: expected {expected} tokens, got {got}")
        return found

    def _share(self, name: str, requests: Requests) -> Requests:
        """Return what a contender is asked: few, where one request is answered after the other."""
        return requests if CONTENDERS[name].mixes else requests[: self._scale.num_peft_requests]

    def _note(self, workload: Workload, requests: Requests, found: dict[str, Any]) -> None:
        ours = found[OURS.name]
        for name, theirs in found.items():
            if name == OURS.name:
                continue
            key, asked = key_of(self._model, workload.name, name), self._share(name, requests)
            pairs = list(zip(ours["answers"], theirs["answers"], strict=False))
            self._book.add(f"{key}/same_rows", [statistics.mean(mine == other for mine, other in pairs)])
            self._book.add(f"{key}/same_tokens", [statistics.mean(_agreed(mine, other) for mine, other in pairs)])
            for whose, one in (("ours", ours), ("theirs", theirs)):
                gaps, firsts = latencies(one["times"])
                if gaps:
                    self._book.add(f"{key}/{whose}_gap_ms", [1e3 * statistics.median(gaps)])
                if firsts:
                    self._book.add(f"{key}/{whose}_first_ms", [1e3 * statistics.median(firsts)])
            rate = workload.num_tokens(asked) / theirs["seconds"]
            print(f"    {self._model} {workload.name}: {name} {rate:.1f} tokens/s", flush=True)
            self._book.add(f"{key}/theirs", [rate])
            self._book.add(f"{key}/ours", [workload.num_tokens(requests) / ours["seconds"]])  # last: the round is whole

    @staticmethod
    def _ask(running: Running, what: str, **fields: Any) -> Any:
        running.resume()
        try:
            return running.ask(what, **fields)
        finally:
            running.pause()


def latencies(times: Sequence[Sequence[float]] | None) -> tuple[list[float], list[float]]:
    """Return the seconds between a request's tokens, of all requests, and those to each first token."""
    times = times or []
    gaps = [later - earlier for own in times for earlier, later in itertools.pairwise(own)]
    return gaps, [own[0] for own in times if own]


def _agreed(mine: Sequence[int], other: Sequence[int]) -> float:
    """Share of the tokens before the first difference."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=True))
    return sum(1 for _ in same) / len(mine)
