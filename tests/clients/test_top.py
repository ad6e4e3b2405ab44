"""`promptd top`, rendered once to text, against a real server and against Prometheus' own arithmetic."""

from __future__ import annotations

import io

import anyio
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from promptd_client import AsyncClient, PermissionDeniedError
from rich.console import Console
from typer.testing import CliRunner

from promptd.cli import app
from promptd.commands.exposition import buckets, parse, quantile, since, total
from promptd.commands.top_view import Reading, view
from tests.clients.conftest import Live


def test_once_as_text(live: Live) -> None:
    """Everything on the screen is the server's own count; what only admins may see is said to be missing."""
    with live.client() as client:
        client.complete("the quick", max_tokens=5, ignore_eos=True)
        told = parse(client.fleet.metrics())
        with pytest.raises(PermissionDeniedError):
            client.fleet.engine()
    result = CliRunner().invoke(app, ["top", "--once", "--interval", "0.1", "--url", live.url, "--api-key", live.key])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    heading = next(index for index, line in enumerate(lines) if line[:2] == ["running", "waiting"])
    cells = dict(zip(lines[heading], lines[heading + 2], strict=True))
    assert cells["requests"] == f"{total(told, 'promptd_requests_total'):,.0f}"
    assert (cells["running"], cells["waiting"], cells["made/s"]) == ("0", "0", "0")
    assert "PROMPTD_API_KEY" in result.output


def test_nobody_there() -> None:
    """Without a server it ends with a hint."""
    result = CliRunner().invoke(app, ["top", "--once", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1 and "promptd serve" in result.output


def test_an_admin_sees_tenants_and_servers() -> None:
    """Rates are those between two readings; names are text, not markup."""
    scrape = "promptd_generation_tokens_total {}\npromptd_requests_running 3\n"
    share = {"key": "[red]acme[/]", "weight": 2.0, "num_running": 3, "num_waiting": 40, "service": 1.0}
    server = {
        "id": "a",
        "at": 100.0,
        "started_at": 40.0,
        "host": "node-1",
        "pid": 7,
        "num_requests_running": 3,
        "max_num_seqs": 16,
        "num_requests_waiting": 40,
        "prompts_resident": 12,
        "generation_tokens": 1000,
    }
    engine = {
        "model": "demo",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "config": {"max_num_seqs": 16},
        "shares": [share],
    }
    before = Reading(100.0, parse(scrape.format(1000)), engine, [server])
    after = {**server, "at": 102.0, "generation_tokens": 1500}
    now = Reading(102.0, parse(scrape.format(1500)), engine, [after])
    console = Console(file=io.StringIO(), width=120)
    console.print(view(now, before))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[red]acme[/]" in text and "40" in text
    assert text.count("250") == 2, "tokens a second, of this server and in the list of all"
    assert "node-1" in text and "62 s" in text


def test_percentiles_are_prometheus_own() -> None:
    """The scrape of Prometheus' library is read to the last count; percentiles interpolate as its server does."""
    registry = CollectorRegistry()
    histogram = Histogram("h", "h", ["who"], buckets=(1, 2, 4), registry=registry)
    first = parse(generate_latest(registry).decode())
    for value in (0.5, 1.5, 1.6, 3.0):
        histogram.labels('a"b').observe(value)
    histogram.labels("c").observe(9.0)
    found = buckets(parse(generate_latest(registry).decode()), "h")
    assert found == [(1.0, 1.0), (2.0, 3.0), (4.0, 4.0), (float("inf"), 5.0)]
    assert since(buckets(first, "h"), found) == found
    assert quantile(0.5, found) == 1.75  # 1 + (2.5 - 1) / 2, as histogram_quantile
    assert quantile(0.99, found) == 4.0 and quantile(0.5, []) is None


async def _fleet(live: Live) -> str:
    async with AsyncClient(live.url, api_key=live.key) as client:
        return await client.fleet.metrics()


def test_the_async_client_reads_the_same(live: Live) -> None:
    """Both clients scrape."""

    assert "promptd_requests_total" in anyio.run(_fleet, live)
