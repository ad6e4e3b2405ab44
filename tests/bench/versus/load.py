"""Requests that come at random moments, at some share of what each engine can do: how even its tokens come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from promptd.bench import Lengths
from promptd.bench.report import percentile
from promptd.modeling import load_model
from tests.bench.book import Book, Row
from tests.bench.models import folder_of
from tests.bench.scale import Scale
from tests.bench.versus.alternate import latencies
from tests.bench.versus.contenders import CONTENDERS, OURS, PEERS, Contender, Running
from tests.bench.versus.environments import UnavailableError
from tests.bench.versus.workloads import Workload

EVEN_TARGET = 2.5
_HIGHEST = 0.95


def key_of(model: str, name: str) -> str:
    """Where an engine's facts begin."""
    return f"load/{model}/{name}"


def check_load(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Every engine that takes requests while others run, one process after the other."""
    rows = []
    for model in scale.load_models:
        for name in (OURS.name, *(scale.peers or [peer.name for peer in PEERS])):
            contender = CONTENDERS[name]
            missing = [share for share in scale.load_shares if book.fact(f"{key_of(model, name)}/{share}") is None]
            if contender.is_continuous and missing:
                try:
                    _measure(contender, missing, scale, book, root, model)
                except UnavailableError as reason:
                    print(f"    {name}: {reason}", flush=True)
        found = book.fact(f"{key_of(model, OURS.name)}/{_HIGHEST}")
        if found is not None:
            ratio = found["gap_p99_ms"] / found["gap_p50_ms"]
            shown = f"{ratio:.2f} x ({found['gap_p99_ms']:.0f} : {found['gap_p50_ms']:.0f} ms)"
            name = f"{model}, p99 : median between tokens at {_HIGHEST:.0%} of capacity"
            rows.append(Row(name, f"<= {EVEN_TARGET} x", shown, ratio <= EVEN_TARGET))
    return rows


def _measure(contender: Contender, shares: Sequence[float], scale: Scale, book: Book, root: Path, model: str) -> None:
    folder = folder_of(model, root)
    spec = load_model(folder).spec
    kind = "soft" if "soft" in contender.kinds else "none"
    virtual = Lengths(scale.virtual_tokens, scale.virtual_tokens)
    text, answer = Lengths(*scale.load_input_tokens), Lengths(*scale.load_output_tokens)
    asked = Workload("load", "", scale.num_load_requests, text, answer, scale.max_num_seqs, (kind,), virtual)
    prompts = asked.prompts(spec, root / "prompts" / model, 0)
    print(f"    loading {contender.name}, {model}", flush=True)
    running = contender.start(folder, root, torch.get_num_threads())
    try:
        if prompts:
            running.ask("prompts", files=prompts)
        key = key_of(model, contender.name)
        _run(running, asked, spec.vocab_size, prompts, 0, None)
        if book.fact(f"{key}/requests_per_second") is None:
            found = _run(running, asked, spec.vocab_size, prompts, 1, None)
            book.note(f"{key}/requests_per_second", asked.num_requests / found["seconds"])
        capacity = book.fact(f"{key}/requests_per_second")
        for share in shares:  # each with texts of its own: none is in a cache
            number = 2 + scale.load_shares.index(share)
            found = _run(running, asked, spec.vocab_size, prompts, number, capacity * share)
            gaps, firsts = latencies(found["times"])
            fact = {"kind": kind, "requests_per_second": capacity * share}
            for label, values in (("gap", gaps), ("first", firsts)):
                fact |= {f"{label}_p{at:.0f}_ms": 1e3 * percentile(values, at / 100) for at in (50, 99)}
            book.note(f"{key}/{share}", fact)
            print(f"    {contender.name} at {share:.0%}: p99 {fact['gap_p99_ms']:.0f} ms between tokens", flush=True)
    finally:
        running.close()


def _run(
    running: Running, asked: Workload, vocab_size: int, prompts: dict[str, str], number: int, rate: float | None
) -> Any:
    """Send one round's requests: all at once, or at random moments, `rate` a second."""
    rng, due = random.Random(number), 0.0
    requests = asked.requests(vocab_size, prompts, number)
    for each in requests if rate is not None else ():
        each["at"] = due
        due += rng.expovariate(rate)
    return running.ask("run", requests=requests, concurrency=asked.concurrency)
