"""Two readings of a server as one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from promptd.commands.console import human_bytes, human_seconds
from promptd.commands.exposition import Samples, buckets, quantile, since, total

MAX_TENANTS = 10
_BAR_CHARS = 30
_LATENCIES = (
    ("first token", "promptd_time_to_first_token_seconds"),
    ("between tokens", "promptd_inter_token_latency_seconds"),
    ("in the queue", "promptd_request_queue_seconds"),
    ("whole request", "promptd_request_seconds"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a server; `engine` and `servers` are for admins only."""

    at: float
    samples: Samples
    engine: Mapping[str, Any] | None = None
    servers: Sequence[Mapping[str, Any]] | None = None


def view(now: Reading, before: Reading | None) -> RenderableType:
    """Draw a screen; rates and latencies are those between the readings."""
    parts: list[RenderableType] = [_title(now), _rows(now, before), _memory(now), _latencies(now, before)]
    if now.engine is not None and now.servers is not None:
        parts += [_tenants(now.engine), _servers(now, before)]
    else:
        parts.append(Text("An admin's key (PROMPTD_API_KEY) shows tenants and servers, too.", style="dim"))
    return Group(*parts)


def _title(now: Reading) -> Text:
    engine = now.engine
    if engine is None:
        return Text("promptd", style="bold")
    title = Text.assemble(("promptd", "bold"), "  ", (str(engine["model"]), "cyan"))
    return title.append(f"  {engine['architecture']}, {engine['dtype']} on {engine['device']}", style="dim")


def _rows(now: Reading, before: Reading | None) -> Table:
    samples = now.samples
    limit = "" if now.engine is None else f" / {now.engine['config']['max_num_seqs']}"
    ended = {labels["outcome"]: value for labels, value in samples.get("promptd_requests_total", ())}
    cells = {
        "running": f"{_whole(total(samples, 'promptd_requests_running'))}{limit}",
        "waiting": _whole(total(samples, "promptd_requests_waiting")),
        "made/s": _rate("promptd_generation_tokens_total", now, before),
        "read/s": _rate("promptd_prompt_tokens_total", now, before),
        "requests": _whole(sum(ended.values())),
        "failed": _whole(ended.get("failed", 0.0)),
        "aborted": _whole(ended.get("aborted", 0.0)),
        "training": _whole(total(samples, "promptd_training_jobs_running")),
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*cells.values())
    return table


def _memory(now: Reading) -> Table:
    samples = now.samples
    used = total(samples, "promptd_prompt_cache_bytes") or 0.0
    capacity = total(samples, "promptd_prompt_cache_capacity_bytes") or 0.0
    hits, misses = (total(samples, f"promptd_prompt_cache_{kind}_total") or 0.0 for kind in ("hits", "misses"))
    found = f", {hits / (hits + misses):.0%} found resident" if hits + misses else ""
    ratio = total(samples, "promptd_kv_cache_usage_ratio") or 0.0
    prompts = f"{human_bytes(int(used))} of {human_bytes(int(capacity))}"
    resident = _whole(total(samples, "promptd_prompts_resident"))
    table = Table.grid(padding=(0, 2))
    table.add_row("K/V of texts", _bar(ratio), f"{ratio:.0%}")
    table.add_row("K/V of prompts", _bar(used / capacity if capacity else 0.0), f"{prompts}; {resident} prompts{found}")
    return table


def _latencies(now: Reading, before: Reading | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("latency", "p50", "p90", "p99", "count"):
        table.add_column(name, justify="left" if name == "latency" else "right", no_wrap=True)
    for label, name in _LATENCIES:
        whole = buckets(now.samples, name)
        recent = since(buckets(before.samples, name), whole) if before is not None else []
        is_recent = bool(recent) and recent[-1][1] > 0
        shown = recent if is_recent else whole
        style = "" if is_recent else "dim"  # nothing ended between the readings: since the start
        cells = [_time(quantile(share, shown)) for share in (0.5, 0.9, 0.99)]
        table.add_row(label, *cells, _whole(shown[-1][1] if shown else None), style=style)
    return table


def _tenants(engine: Mapping[str, Any]) -> RenderableType:
    shares = sorted(engine["shares"], key=lambda share: (-share["num_running"], -share["num_waiting"], share["key"]))
    if not shares:
        return Text("No tenant has work here now.\n", style="dim")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tenant", "weight", "running", "waiting"):
        table.add_column(name, justify="left" if name == "tenant" else "right", no_wrap=True)
    for share in shares[:MAX_TENANTS]:
        numbers = (f"{share['weight']:g}", str(share["num_running"]), str(share["num_waiting"]))
        table.add_row(escape(str(share["key"])), *numbers)
    if len(shares) > MAX_TENANTS:
        table.add_row(f"[dim]and {len(shares) - MAX_TENANTS} more[/]")
    return table


def _servers(now: Reading, before: Reading | None) -> Table:
    old = {server["id"]: server for server in (before.servers if before is not None else None) or ()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("server", "process", "running", "waiting", "made/s", "resident", "up"):
        table.add_column(name, justify="left" if name == "server" else "right", no_wrap=True)
    for server in now.servers or ():
        seconds = server["at"] - old[server["id"]]["at"] if server["id"] in old else 0.0
        made = server["generation_tokens"] - old[server["id"]]["generation_tokens"] if seconds > 0 else 0
        table.add_row(
            escape(str(server["host"])),
            str(server["pid"]),
            f"{server['num_requests_running']} / {server['max_num_seqs']}",
            str(server["num_requests_waiting"]),
            f"{max(0, made) / seconds:.0f}" if seconds > 0 else "-",
            str(server["prompts_resident"]),
            human_seconds(server["at"] - server["started_at"]),
        )
    return table


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=min(1.0, share), width=_BAR_CHARS, complete_style="cyan")


def _rate(name: str, now: Reading, before: Reading | None) -> str:
    after, start = total(now.samples, name), None if before is None else total(before.samples, name)
    if before is None or after is None or start is None or after < start or now.at <= before.at:
        return "-"  # a server that started again counts from zero
    return f"{(after - start) / (now.at - before.at):.0f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
