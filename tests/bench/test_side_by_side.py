"""`python -m tests.bench --smoke`: every contender and check runs, and answers with what it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch

from tests.bench.__main__ import CHECKS, main
from tests.bench.fleet import measure_publishes, measure_replicas
from tests.bench.memory import measure_growth, measure_resident
from tests.bench.models import frozen
from tests.bench.scale import SMOKE
from tests.redis_server import running_redis
from tests.replicas import ReplicaForge, running_replicas

QUICK = ["w1", "mixing", "overhead", "encoders", "seq2seq", "resident", "first-use"]
IN_PROCESSES = sorted(set(CHECKS) - set(QUICK))


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """The bench sets the number of torch's threads; the other tests count on one."""
    assert torch.get_num_threads() == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_contenders_agree_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """All contenders make the tokens that were asked for and equal greedy answers; a second call measures nothing."""
    arguments = [*QUICK, "--smoke", "--threads", "1", "--folder", str(tmp_path)]
    rows = main(arguments)
    equal = next(row.measured for row in rows if "equal" in row.check)
    assert equal == f"100.00%, {SMOKE.num_requests} distinct answers"
    assert len([row for row in rows if row.is_met is not None]) >= len(QUICK)
    noted = (tmp_path / "results.json").read_text()
    (series,) = json.loads(noted).values()
    assert len(series["w1/promptd"]) == SMOKE.num_rounds
    assert len(series["resident/tiny/with_ms"]) == SMOKE.num_latency_pairs
    assert main(arguments) == rows
    assert (tmp_path / "results.json").read_text() == noted


def test_residents_are_counted_to_the_byte(tmp_path: Path) -> None:
    """The engine's account of resident prompts is exactly their K/V, for either kind."""
    for kind in ("soft", "prefix"):
        found = measure_resident("tiny", kind, SMOKE, tmp_path)
        assert found["counted"] == found["kv"] > 0


def test_a_small_budget_evicts_and_answers_everything(tmp_path: Path) -> None:
    """Requests over more prompts than fit: all finish, no more prompts are resident than the budget holds."""
    found = measure_growth(SMOKE, tmp_path)
    assert found["resident"] == SMOKE.num_growth_budget
    assert found["evictions"] == SMOKE.num_growth_requests - SMOKE.num_growth_budget


def test_one_server_and_two_are_asked_in_turn(forge: ReplicaForge, tmp_path: Path) -> None:
    """Behind the balancer of one the other one has nothing to do; behind that of two both answer."""
    found = measure_replicas(forge, tmp_path, SMOKE, SMOKE.fleet_step_seconds)
    assert [len(rates) for rates in found.rates.values()] == [1, 1]
    assert found.answered[1][0] > 0 == found.answered[1][1] and min(found.answered[2]) > 0
    assert set(found.cores[2][0]) == {"HAProxy", "Redis", "load generator", "server 1", "server 2"}


def test_publications_are_timed(forge: ReplicaForge, tmp_path: Path) -> None:
    """Each of them, and what was published last is there."""
    with (
        running_redis(tmp_path / "redis") as redis,
        running_replicas(forge, tmp_path, redis.url, 1) as (server,),
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        assert len(measure_publishes(http, frozen(forge.model).spec, SMOKE)) == SMOKE.num_publishes


@pytest.mark.long
@pytest.mark.parametrize("check", IN_PROCESSES)
def test_checks_that_start_processes(check: str, tmp_path: Path) -> None:
    """Each gives its rows."""
    assert main([check, "--smoke", "--threads", "1", "--folder", str(tmp_path)])
