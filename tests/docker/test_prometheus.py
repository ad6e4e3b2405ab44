"""The dashboard's queries and the alerts, in a real Prometheus that scrapes a real server."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.harness import library
from tests.patience import until
from tests.ports import free_port
from tests.redis_server import program

DOCKER = Path(__file__).parents[2] / "docker"
RULES = DOCKER / "alerts.yml"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "promptd.json"
NAME = re.compile(r"\bpromptd_\w+")
SCRAPE_SECONDS = 0.5
RUN: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 60}


def queries() -> list[str]:
    """What the dashboard asks."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def busy(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that trains too, with one prompt."""
    store = str(tmp_path_factory.mktemp("busy"))
    settings = Settings(model=str(tiny_models["llama"]), store=store, drain_seconds=0)
    prompts = {"p0": library(tiny_models["llama"])[0].content}
    with serve(settings, tiny_models["llama"], prompts=prompts) as live:
        yield live


def use(http: httpx.Client) -> None:
    """One request under a prompt, of several tokens."""
    body = {"model": "p0", "prompt": "the", "max_tokens": 4, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_every_metric_that_is_named_is_exported(busy: LiveServer) -> None:
    """No panel and no alert asks for something that a server does not have."""
    with busy.http() as http:
        use(http)
        exported = set(re.findall(r"^(promptd_\w+?)(?:\{| )", http.get("/metrics").text, flags=re.MULTILINE))
    named = {name for text in (*queries(), *(rule["expr"] for rule in rules())) for name in NAME.findall(text)}
    assert len(named) > 25 and named <= exported, named - exported


@contextlib.contextmanager
def prometheus(server: LiveServer, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus with our rules that scrapes one server."""
    binary, port = program("prometheus"), free_port()
    target = server.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": f"{int(1000 * SCRAPE_SECONDS)}ms", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "promptd", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:

            def is_ready() -> bool:
                assert process.poll() is None, (folder / "log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    return http.get("/-/ready").status_code == 200
                return False

            until(is_ready, "Prometheus is ready", pause_seconds=0.05)
            yield http
    finally:
        process.terminate()
        process.wait(20)


def ask(http: httpx.Client, query: str) -> list[dict[str, Any]]:
    """Run one query."""
    reply = http.get("/api/v1/query", params={"query": query}).json()
    assert reply["status"] == "success", (query, reply)
    found: list[dict[str, Any]] = reply["data"]["result"]
    return found


def test_the_dashboard_over_a_server_at_work(busy: LiveServer, tmp_path: Path) -> None:
    """Every query of the dashboard and every recording rule finds numbers; a control finds none."""
    with prometheus(busy, tmp_path) as http, busy.http() as user:
        missing = [*queries(), *(rule["record"] for rule in rules() if "record" in rule)]

        def is_answered() -> bool:
            use(user)
            missing[:] = [query for query in missing if not answered(ask(http, query))]
            return not missing

        until(is_answered, missing, pause_seconds=SCRAPE_SECONDS / 2)
        assert ask(http, "promptd_no_such_metric") == []
        known = {
            rule["name"] for group in http.get("/api/v1/rules").json()["data"]["groups"] for rule in group["rules"]
        }
        assert {rule["alert"] for rule in rules() if "alert" in rule} <= known


def answered(found: list[dict[str, Any]]) -> bool:
    """Whether a result has a number in it."""
    return any(series["value"][1] != "NaN" for series in found)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    """promtool plays hours of made-up series; each alert fires on its fault and is silent on a healthy server."""
    program("prometheus")
    promtool = program("promtool")  # of the same package
    checked = subprocess.run([promtool, "check", "rules", RULES], **RUN)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    played = Path(__file__).parent / "alerts_test.yml"
    tested = subprocess.run([promtool, "test", "rules", played], **RUN)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    fired = {
        case["alertname"]
        for one in yaml.safe_load(played.read_text())["tests"]
        for case in one["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}, "an alert that is never made to fire"
