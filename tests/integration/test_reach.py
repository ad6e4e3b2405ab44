"""What a server can be reached by, and whom it reaches: one port, and nobody."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.engine.harness import library
from tests.ports import free_port
from tests.replicas import Replica, ReplicaForge

ADMIN = "key-of-the-admin"


@contextmanager
def watched(forge: ReplicaForge, folder: Path, **settings: str) -> Iterator[tuple[Replica, Path]]:
    """A server, and the file of the addresses that it connects to."""
    folder.mkdir()
    connects = folder / "connects"
    given: dict[str, Any] = {"admin_key": ADMIN, "drain_seconds": 0, "leave_seconds": 0, **settings}
    replica = Replica(forge, folder, str(folder / "store"), traits={"connects": str(connects)}, **given)
    try:
        yield replica.start().until_ready(), connects
        replica.signal(signal.SIGTERM)  # what is sent at the end is sent, too
        assert replica.wait() == 0
    finally:
        replica.close()


def test_one_port_and_nobody(forge: ReplicaForge, tmp_path: Path) -> None:
    """Uploads, texts, files, jobs and answers open no other port and connect to nothing. The control sends traces."""
    content = library(forge.model)[0].content
    for number, settings in enumerate(({}, {"traces": f"http://127.0.0.1:{free_port()}"})):
        with watched(forge, tmp_path / str(number), training="inline", **settings) as (replica, connects):
            with httpx.Client(base_url=replica.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as http:
                assert http.put("/v1/prompts/p", content=content).status_code == 201
                assert http.put("/v1/prompts/t", json={"text": "see http://127.0.0.1:9/x"}).status_code == 201
                body = {"model": "t", "prompt": "http://127.0.0.1:9/y", "max_tokens": 2}
                assert http.post("/v1/completions", json=body).status_code == 200
                job = {"rows": [{"prompt": "http://127.0.0.1:9/z", "completion": " b"}] * 4, "suffix": "x"}
                assert http.post("/v1/fine_tuning/jobs", json={"model": forge.model.name, **job}).status_code == 200
                assert http.get("/metrics").status_code == 200
                ports = {one.laddr.port for one in listening(replica)}
            assert ports == {replica.port}
        assert connects.exists()
        assert (connects.read_text() != "") == bool(settings), connects.read_text()


def listening(replica: Replica) -> list[psutil._common.pconn]:
    """Where its process listens."""
    connections = psutil.Process(replica.pid).net_connections("all")
    return [one for one in connections if one.status == psutil.CONN_LISTEN]
