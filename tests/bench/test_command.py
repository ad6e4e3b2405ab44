"""`promptd bench`: every request is made, every token counted; times are not tested."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from promptd.bench import BenchPrompt, EngineTarget, Lengths, ModelSizes, Workload, run_bench
from promptd.bench.report import Sample, percentile, summarize
from promptd.bench.server import ServerTarget
from promptd.bench.workload import make_prompts, make_requests
from promptd.cli import app
from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.harness import frozen, make_engine

WORKLOAD = Workload(
    num_requests=9,
    num_prompts=4,
    kinds=("soft", "prefix", "text", "none"),
    virtual_tokens=Lengths(2, 6),
    input_tokens=Lengths(5, 9),
    output_tokens=Lengths(3, 6),
    concurrency=3,
)


def expected_tokens(prompts: list[BenchPrompt], vocab_size: int, run: int) -> int:
    """Output tokens that a run asks for."""
    return sum(request.max_tokens for request in make_requests(WORKLOAD, prompts, vocab_size, run=run))


@pytest.fixture
def live(tiny_models: dict[str, Path], tmp_path: Path) -> Iterator[LiveServer]:
    """A server of its own."""
    folder = tiny_models["llama"]
    with serve(Settings(model=str(folder), store=str(tmp_path / "store"), drain_seconds=1), folder) as live:
        yield live


def test_every_token_of_an_engine_is_counted(tiny_models: dict[str, Path]) -> None:
    """The report has the tokens that were asked for, and each prompt missed the cache once, on its first use."""
    engine = make_engine(tiny_models["llama"])
    sizes = ModelSizes.of_spec(engine.model.spec)
    prompts = make_prompts(WORKLOAD, sizes)
    assert [prompt.kind for prompt in prompts] == list(WORKLOAD.kinds)
    report = asyncio.run(run_bench(EngineTarget(engine), WORKLOAD, prompts, num_warmups=0, num_repeats=2))
    assert [run.output_tokens for run in report.runs] == [
        expected_tokens(prompts, sizes.vocab_size, run) for run in (0, 1)
    ]
    assert [run.num_requests for run in report.runs] == [9, 9]
    assert report.num_failed == 0
    assert [run.prompt_cache_misses for run in report.runs] == [3, 0]
    named = [sum(r.prompt.artifact is not None for r in make_requests(WORKLOAD, prompts, 99, run=n)) for n in (0, 1)]
    assert [(run.prompt_cache_hits or 0) + (run.prompt_cache_misses or 0) for run in report.runs] == named
    assert report.to_json()["median"]["ttft_p50_ms"] > 0


def test_a_server_is_driven_and_left_as_it_was(live: LiveServer) -> None:
    """Over HTTP the same tokens come out, the server's own counters are read, and no made-up prompt stays behind."""
    sizes = ModelSizes.of_spec(live.model.spec)
    prompts = make_prompts(WORKLOAD, sizes)
    target = ServerTarget(live.url, concurrency=3, vocab_size=sizes.vocab_size)
    report = asyncio.run(run_bench(target, WORKLOAD, prompts, num_warmups=1, num_repeats=1))
    (run,) = report.runs
    assert run.output_tokens == expected_tokens(prompts, sizes.vocab_size, 1)
    assert (run.num_failed, run.prompt_cache_misses) == (0, 0)
    assert (run.prompt_cache_hits or 0) > 0
    assert (run.peak_rss_bytes or 0) > 1 << 20
    with live.http() as http:
        assert http.get("/v1/prompts").json()["data"] == []


def test_failed_requests_are_counted_and_explained(live: LiveServer) -> None:
    """A prompt that is not there: no tokens, every request failed, the server's reason is kept."""
    workload = Workload(num_requests=4, num_prompts=1, concurrency=2)
    target = ServerTarget(live.url)
    report = asyncio.run(run_bench(target, workload, [BenchPrompt("nobody", "named")], num_warmups=0, num_repeats=1))
    (run,) = report.runs
    assert (run.num_failed, run.output_tokens, run.ttft_p50_ms) == (4, 0, None)
    assert "nobody" in (run.first_error or "")


def test_the_command_writes_its_report(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """`promptd bench --model DIR --json FILE` ends with 0 and leaves medians, runs and workload in the file."""
    file = tmp_path / "report.json"
    sizes = ["-n", "4", "-c", "2", "-m", "3", "--virtual-tokens", "4", "--input-tokens", "6", "--output-tokens", "3-5"]
    arguments = ["bench", "--model", str(tiny_models["gpt2"]), *sizes, "--repeats", "2", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "output tokens/s" in result.output
    report = json.loads(file.read_text())
    assert report["workload"]["output_tokens"] == "3-5"
    assert [run["num_requests"] for run in report["runs"]] == [4, 4]
    assert report["median"]["num_failed"] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--kinds", "soft,mushy"], "mushy"),
        (["--input-tokens", "9-3"], "9-3"),
        (["--use", "someone"], "--url"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--url", "http://127.0.0.1:9", "--use", "someone"], "promptd serve"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], reason: str) -> None:
    """Bad options and absent servers end with status 1 and one line that names the cause."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert reason in result.output


def test_the_same_seed_asks_the_same(tiny_models: dict[str, Path]) -> None:
    """Versions of prompts and token ids repeat with the seed; runs, seeds and names differ."""
    sizes = ModelSizes.of_spec(frozen(tiny_models["llama"]).spec)
    first, again = make_prompts(WORKLOAD, sizes), make_prompts(WORKLOAD, sizes)
    versions = [[p.artifact and p.artifact.version for p in prompts] for prompts in (first, again)]
    assert versions[0] == versions[1]
    assert first[0].name != again[0].name
    asked = [[r.token_ids for r in make_requests(WORKLOAD, first, 99, run=run)] for run in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]


def test_percentiles_are_values_that_occurred() -> None:
    """p50 and p99 by nearest rank; intervals are taken inside a request, never across two."""
    assert [percentile([5.0, 1.0, 3.0, 2.0], share) for share in (0.5, 0.99)] == [2.0, 5.0]
    samples = [Sample(0.0, [1.0, 1.5]), Sample(10.0, [10.25, 10.75]), Sample(0.0, error="no")]
    run = summarize(samples, 2.0, prompt_cache_hits=None, prompt_cache_misses=None, peak_rss_bytes=None)
    assert (run.ttft_p50_ms, run.ttft_p99_ms, run.inter_token_p99_ms) == (250.0, 1000.0, 500.0)
    assert (run.output_tokens_per_second, run.num_failed) == (2.0, 1)
