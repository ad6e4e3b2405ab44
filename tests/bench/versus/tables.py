"""From the book to Markdown tables, one function a table; nothing here runs a model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import peft

from tests.bench.book import Book
from tests.bench.scale import Scale
from tests.bench.versus.contenders import CONTENDERS, OURS, PEERS
from tests.bench.versus.load import key_of as load_key
from tests.bench.versus.targets import key_of, ratio_of

NOTHING = "-"
COLUMNS = {
    "w0": "no prompts",
    "w1": "soft prompt each",
    "w1-new": "soft, never seen",
    "w1p": "prefix each",
    "w1m": "mixed kinds",
    "w2": "one row alone",
    "long": "long texts",
    "shared": "shared text",
}
OTHERS = [name for name in CONTENDERS if name != OURS.name]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rates(book: Book, model: str, workload: str, name: str) -> list[float]:
    """Return the rates of one engine in all rounds; promptd's are those beside the peer with the most rounds."""
    if name != OURS.name:
        return book.series(f"{key_of(model, workload, name)}/theirs")
    return [rate for other in OTHERS for rate in book.series(f"{key_of(model, workload, other)}/ours")]


def measured(book: Book, model: str) -> list[str]:
    """Return the engines that have any number of this model, promptd first."""
    return [name for name in CONTENDERS if any(rates(book, model, workload, name) for workload in COLUMNS)]


def rates_table(book: Book, models: Sequence[str]) -> str:
    """Tokens per second, medians."""
    rows = [
        [model, name, *(_median(rates(book, model, workload, name)) for workload in COLUMNS)]
        for model in models
        for name in measured(book, model)
    ]
    return table(["model", "engine", *COLUMNS.values()], rows)


def ratios_table(book: Book, models: Sequence[str]) -> str:
    """promptd's rate over the peer's in the same round: the median, and the range over the rounds."""
    rows = [
        [model, name, *(_ratio(book, model, workload, name) for workload in COLUMNS)]
        for model in models
        for name in measured(book, model)
        if name != OURS.name
    ]
    return table(["model", "promptd : engine", *COLUMNS.values()], rows)


def steps_table(book: Book, models: Sequence[str]) -> str:
    """Where the time goes: milliseconds between tokens and to the first one, of engines that say when tokens come."""
    rows = []
    for model in models:
        for name in measured(book, model):
            cells = []
            for workload in COLUMNS:
                parts = [_latency(book, model, workload, name, what) for what in ("gap", "first")]
                cells.append(" / ".join(parts) if any(part != NOTHING for part in parts) else NOTHING)
            if set(cells) != {NOTHING}:
                rows.append([model, name, *cells])
    return table(["model", "engine", *COLUMNS.values()], rows)


def costs_table(book: Book, models: Sequence[str]) -> str:
    """Memory and start-up."""
    rows = []
    for model in models:
        for name in measured(book, model):
            peak = book.fact(f"versus/{model}/{name}/peak_bytes")
            starts = book.series(f"versus/{model}/{name}/start_seconds")
            shown = f"{min(starts):.1f} to {max(starts):.1f}" if len(starts) > 1 else _median(starts)
            rows.append([model, name, f"{peak / 1e9:.2f}" if peak else NOTHING, shown])
    return table(["model", "engine", "peak resident memory, GB", "seconds to the first answer"], rows)


def agreement_table(book: Book, models: Sequence[str]) -> str:
    """Greedy tokens against promptd's: whole rows that are the same / tokens before the first difference."""
    rows = []
    for model in models:
        for name in measured(book, model):
            if name == OURS.name:
                continue
            cells = []
            for workload in COLUMNS:
                same = [book.series(f"{key_of(model, workload, name)}/same_{what}") for what in ("rows", "tokens")]
                cells.append(" / ".join(f"{statistics.mean(one):.1%}" for one in same) if all(same) else NOTHING)
            rows.append([model, name, *cells])
    return table(["model", "engine", *COLUMNS.values()], rows)


def load_table(book: Book, models: Sequence[str]) -> str:
    """Random arrivals."""
    rows = []
    for model in models:
        for name in CONTENDERS:
            capacity = book.fact(f"{load_key(model, name)}/requests_per_second")
            for share in (0.5, 0.8, 0.95):
                found = book.fact(f"{load_key(model, name)}/{share}")
                if found is not None:
                    prompts = "soft prompt each" if found["kind"] == "soft" else "no prompts"
                    numbers = [f"{found[f'{what}_p{at}_ms']:.0f}" for what in ("gap", "first") for at in (50, 99)]
                    rows.append([model, name, prompts, f"{capacity:.2f}", f"{share:.0%}", *numbers])
    header = ["model", "engine", "rows", "capacity, requests/s", "load", "between tokens, p50 ms", "p99 ms"]
    return table([*header, "first token, p50 ms", "p99 ms"], rows)


def absent_table(book: Book, models: Sequence[str]) -> str:
    """What was not measured, and why."""
    rows = []
    for model in models:
        for name in OTHERS:
            reasons = {"all": book.fact(f"versus/{model}/{name}/absent")}
            reasons |= {title: book.fact(f"{key_of(model, at, name)}/failed") for at, title in COLUMNS.items()}
            rows += [[model, name, title, reason.replace("|", "/")] for title, reason in reasons.items() if reason]
    return table(["model", "engine", "what", "reason"], rows)


def setting_table(book: Book, scale: Scale) -> str:
    """What every number has in common."""
    pins = {pin for peer in PEERS if peer.environment is not None for pin in peer.environment.packages[:1]}
    facts = {
        "machine": book.fact("machine") or NOTHING,
        "engines": f"{', '.join(sorted(pins))}, peft=={peft.__version__}; {scale.versus_rounds} rounds, float32 "
        "throughout unless an engine's name says otherwise",
        "requests": f"{scale.num_requests} (half as many of {', '.join(scale.slow_models) or 'none'}), "
        f"{scale.input_tokens} tokens in, {scale.output_tokens} out, greedy, {scale.max_num_seqs} at once, "
        f"{scale.virtual_tokens} virtual tokens",
    }
    return table(["", ""], [[name, value] for name, value in facts.items()])


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else NOTHING


def _ratio(book: Book, model: str, workload: str, name: str) -> str:
    ratio, key = ratio_of(book, model, workload, name), key_of(model, workload, name)
    if ratio is None:
        return NOTHING
    each = [a / b for a, b in zip(book.series(f"{key}/ours"), book.series(f"{key}/theirs"), strict=False)]
    shown = f"{ratio:.2f} ({min(each):.2f} to {max(each):.2f})"
    return shown if ratio >= 1 else f"**{shown}**"


def _latency(book: Book, model: str, workload: str, name: str, what: str) -> str:
    if name == OURS.name:
        values = [ms for other in OTHERS for ms in book.series(f"{key_of(model, workload, other)}/ours_{what}_ms")]
    else:
        values = book.series(f"{key_of(model, workload, name)}/theirs_{what}_ms")
    return _median(values)
