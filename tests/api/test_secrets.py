"""What gets out: canaries, sent everywhere, then looked for in logs, metrics and bodies; and whom a server talks to."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import structlog

from promptd import logs
from promptd.tenancy.api_keys import new_key
from tests.api.conftest import MODEL
from tests.collector import Collector
from tests.engine.harness import library
from tests.replicas import Replica, ReplicaForge

STATIC, ADMIN, SECRET = "canary-static-key-7f3a", "canary-admin-key-91bd", "canary-hash-secret-55c0"
TEXT, DATA, PERSON = "canarytext6d2e", "canarydata4b8f", "canaryperson0c77"


@pytest.fixture
def replica(forge: ReplicaForge, tmp_path: Path) -> Iterator[Replica]:
    """`promptd serve` in a process of its own, with its real log."""
    keys = {"api_keys": f"acme:{STATIC},eve:eve-key-00001", "admin_key": ADMIN, "key_secret": SECRET}
    made = Replica(forge, tmp_path, str(tmp_path / "store"), **keys)
    made.start().until_ready()
    yield made
    made.close()


def test_no_secret_gets_out(replica: Replica, forge: ReplicaForge) -> None:
    """Whatever is asked, well or badly, nothing of it is in the log or the metrics, and no key in any body."""
    bodies: list[str] = []

    def note(answer: httpx.Response) -> None:
        answer.read()
        bodies.append(answer.text)

    content = library(forge.model)[0].content
    with httpx.Client(base_url=replica.url, timeout=60, event_hooks={"response": [note]}) as http:
        admin, own, eve = ({"Authorization": f"Bearer {key}"} for key in (ADMIN, STATIC, "eve-key-00001"))
        issued = http.post("/admin/keys", json={"tenant": "late"}, headers=admin).json()["key"]
        bodies.clear()  # the one place where a key is shown
        late = {"Authorization": f"Bearer {issued}"}
        assert http.put("/v1/prompts/p", content=content, headers=own).status_code == 201
        assert http.put("/v1/prompts/t", json={"text": f"be {TEXT}"}, headers=own).status_code == 201
        for headers in (own, late, eve, {"Authorization": f"Bearer {issued[:-1]}x"}, {"Authorization": issued}, {}):
            labels = {**headers, "X-Request-Id": issued}  # a client may write anything here, and in a path
            http.post("/v1/completions", json={"model": MODEL, "prompt": TEXT, "max_tokens": 2}, headers=labels)
            http.post("/v1/completions", json={"model": "t", "prompt": TEXT, "stream": True}, headers=labels)
            http.post("/v1/completions", content=f'{{"prompt": "{TEXT}'.encode(), headers=labels)
            http.post("/v1/files", files={"file": ("f", DATA.encode())}, data={"purpose": "fine-tune"}, headers=labels)
            http.get(f"/v1/prompts/{issued}", headers=headers)
            http.get("/v1/prompts/p/content", headers=headers)
            http.put("/v1/prompts/u", json={"text": "x"}, params={"user": PERSON}, headers=headers)
            http.delete(f"/v1/users/{PERSON}", headers=headers)
            http.get("/nowhere", params={"key": issued}, headers=headers)
        for path in ("/admin/keys", "/admin/tenants", "/admin/audit", "/admin/engine"):
            assert http.get(path, headers=admin).status_code == 200
        told = [body for body in bodies if issued in body]
        assert all("/v1/prompts/" in body or "no prompt" in body for body in told)  # its own path, said back
        metrics = http.get("/metrics").text
    log = replica.log.read_text()
    assert log.count('"event": "request"') > 40  # the control: it was written, and its requests are there
    for where, text in (("log", log), ("metrics", metrics), ("bodies", "".join(set(bodies) - set(told)))):
        for canary in (STATIC, ADMIN, SECRET, issued, issued.split("_")[2], DATA):
            assert canary not in text, (where, canary)
    assert "/v1/users/" in log
    for content in (TEXT, PERSON):
        assert content not in log and content not in metrics
    eve_bodies = [body for body in bodies if DATA in body]
    assert eve_bodies == []


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Where the loggers write that a test configures; everything is put back afterwards."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield io.StringIO()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.configure(**before)


def fail(text: str) -> None:
    """Raise an error whose message holds content, as libraries do."""
    raise KeyError(text)


def say_everything(secret: str) -> None:
    """Log a key in every way that one gets into a log."""
    key = new_key().text
    logger, plain = structlog.get_logger("test"), logging.getLogger("somebody.else")
    logger.info("request", path=f"/v1/prompts/{key}", header=f"Bearer {secret}", parts=["x", key])
    plain.warning("connecting to redis://user:%s@host/0 with %s", secret, key)
    try:
        fail(TEXT)
    except KeyError:
        logger.exception("unexpected")
        plain.exception("unexpected")


def test_the_scrubber(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are masked whoever logs them, and messages of errors stay out; the lines that they came through do not."""
    monkeypatch.setattr(sys, "stderr", log)
    logs.configure(secrets=[STATIC])
    say_everything(STATIC)
    written = log.getvalue()
    assert "pd_" not in written and STATIC not in written and TEXT not in written
    events = [json.loads(line) for line in written.splitlines()]
    assert len(events) == 4
    for event in events[2:]:
        assert event["exception"] == "KeyError" and event["raised_at"][-1].endswith("fail")
    log.truncate(0)  # the control: without the two processors, all of it is there
    monkeypatch.setattr(logs, "tell_where", structlog.processors.format_exc_info)
    monkeypatch.setattr(logs.KeyMask, "_masked", lambda self, value: value)
    logs.configure(secrets=[STATIC])
    say_everything(STATIC)
    assert all(canary in log.getvalue() for canary in ("pd_", STATIC, TEXT))


def test_one_port_and_nobody_is_told(forge: ReplicaForge, tmp_path: Path) -> None:
    """A server listens where it is told, and whatever it is sent, it connects to nobody; the control sends traces."""
    assert connects_of(forge, tmp_path / "alone") == ""
    with Collector() as collector:
        assert str(httpx.URL(collector.url).port) in connects_of(forge, tmp_path / "traced", traces=collector.url)


def connects_of(forge: ReplicaForge, folder: Path, **settings: str) -> str:
    """Run a server from its start to its end; return the addresses that it connected to."""
    told, address = folder / "told", "http://127.0.0.1:9/x"
    folder.mkdir()
    given: dict[str, Any] = {"admin_key": ADMIN, "drain_seconds": 0, "leave_seconds": 0, "training": "worker"}
    replica = Replica(forge, folder, str(folder / "store"), traits={"connects": str(told)}, **given, **settings)
    try:
        replica.start().until_ready()
        with httpx.Client(base_url=replica.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as http:
            assert http.put("/v1/prompts/p", content=library(forge.model)[0].content).status_code == 201
            assert http.put("/v1/prompts/t", json={"text": address}).status_code == 201
            body = {"model": "t", "prompt": address, "max_tokens": 2, "user": address}
            assert http.post("/v1/completions", json=body).status_code == 200
            job = {"model": MODEL, "rows": [{"prompt": address, "completion": address}] * 4}
            assert http.post("/v1/fine_tuning/jobs", json=job).status_code == 200
            found = psutil.Process(replica.pid).net_connections("tcp")
            assert {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN} == {replica.port}
        replica.signal(signal.SIGTERM)  # what is sent at the end is sent, too
        assert replica.wait() == 0
    finally:
        replica.close()
    return told.read_text()
