"""What a worker's process tells Prometheus and its supervisor, held against the jobs that it did."""
# ruff: noqa: ASYNC212 (these tests look at other processes and may block)

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import typer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from promptd.commands.launch import listen
from promptd.metrics_server import MAX_SILENT_SECONDS, MetricsServer
from promptd.modeling import FrozenModel
from promptd.training import TrainingLoop
from tests.ports import free_port
from tests.training.site import STEPS, Site

pytestmark = pytest.mark.anyio


@pytest.fixture
async def site(tmp_path: Path, tiny_models: dict[str, Path], llama: FrozenModel) -> Any:
    """A store of its own."""
    site = Site(tmp_path, tiny_models["llama"], llama)
    yield site
    await site.store.close()


def samples(text: str) -> Iterator[tuple[str, float]]:
    """Names with their labels' values, and numbers."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield "/".join([sample.name, *sample.labels.values()]), sample.value


async def test_a_worker_is_scraped(site: Site) -> None:
    """Jobs by outcome, every step, the time of steps, memory and the store; it is live, and has no other page."""
    port = free_port()
    good = [await site.create(f"good-{number}", number) for number in range(2)]
    bad = await site.create("bad", num_virtual_tokens=4096)  # more than the model has places for
    with site.worker(metrics_port=port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        for job in good:
            await site.version(job)
        await site.until(bad, lambda job: job.state.is_ended)
        with anyio.fail_after(60):
            while True:  # a job is counted behind its last record
                found = dict(samples(http.get("/metrics").text))
                if found["promptd_training_jobs_running"] == 0:
                    break
                await anyio.sleep(0.05)
        assert found["promptd_training_jobs_total/succeeded"] == 2
        assert found["promptd_training_jobs_total/failed"] == 1
        assert found["promptd_training_steps_total"] == 2 * STEPS["num_steps"]
        assert found["promptd_training_step_seconds_total"] > 0
        assert found["promptd_training_leases_lost_total"] == 0
        assert found["process_resident_memory_bytes"] > 1 << 20
        assert found["promptd_store_up"] == 1 and found["promptd_store_seconds_count/transact"] > 2
        assert http.get("/livez").json() == {"status": "ok"}
        assert http.get("/v1/models").status_code == 404
        assert http.post("/livez").status_code == 501
        assert "promptd_training_steps" in http.get("/metrics?x=1").text


def test_a_worker_that_stands_still_is_not_live() -> None:
    """Probes get 503 as long as nothing moves, however many ask; a port that is taken is told by its option."""
    silent = [0.0]
    with (
        listen("127.0.0.1", 0) as bound,
        MetricsServer(bound, CollectorRegistry(), lambda: silent[0]),
        httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=20) as http,
    ):
        for seconds, status in ((0.0, 200), (MAX_SILENT_SECONDS, 200), (MAX_SILENT_SECONDS + 1, 503), (1.0, 200)):
            silent[0] = seconds
            assert http.get("/livez").status_code == status
        with pytest.raises(typer.Exit):
            listen("127.0.0.1", bound.getsockname()[1], "--metrics-port")


def test_a_pass_that_hangs_is_noticed(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop tells, from outside of its thread, for how long the present pass has run; between passes nothing."""
    loop, is_in, go_on = TrainingLoop(llama), threading.Event(), threading.Event()

    def hang(*args: object) -> dict[str, object]:
        is_in.set()
        assert go_on.wait(60)
        return {}

    monkeypatch.setattr(loop._trainer, "run_pass", hang)
    thread = threading.Thread(target=loop.run)
    assert loop.seconds_in_pass() == 0.0
    thread.start()
    try:
        assert is_in.wait(60)
        first = loop.seconds_in_pass()
        assert loop.seconds_in_pass() >= first > 0.0
    finally:
        go_on.set()
        thread.join()
    assert loop.seconds_in_pass() == 0.0
