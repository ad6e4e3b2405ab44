"""One real server for the session: uvicorn on a free loopback port, a tiny model, the embedded store."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from promptd_client import Client
from promptd_store import PromptArtifact
from pydantic import SecretStr

from promptd.app import create_app
from promptd.modeling import FrozenModel
from promptd.settings import Settings
from promptd.tracing import Tracing
from tests.engine.harness import frozen, library
from tests.patience import PATIENCE_SECONDS, until
from tests.ports import NO_CERTIFICATES

if TYPE_CHECKING:
    from tests.api.training_server import TrainingServer

MODEL = "tiny-llama"
ADMIN_KEY = "the-first-admin-key"


@dataclass
class LiveServer:
    """A server in a thread of this process."""

    url: str
    app: FastAPI
    folder: Path

    @property
    def model(self) -> FrozenModel:
        """The tiny model, as the tests load it themselves."""
        return frozen(self.folder)

    def http(self, **headers: str) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_SECONDS, verify=NO_CERTIFICATES)

    def ended(self, job_id: str) -> dict[str, Any]:
        """Wait for the end of a job of the tenant that needs no key; return it as it is then."""
        job: dict[str, Any] = {}
        with self.http() as http:

            def has_ended() -> bool:
                job.update(http.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json())
                return job["status"] not in ("queued", "running")

            until(has_ended, f"{job_id} ends", seconds=2 * PATIENCE_SECONDS, pause_seconds=0.05)
        return job


@contextlib.contextmanager
def serve(
    settings: Settings, folder: Path, *, prompts: Mapping[str, bytes] | None = None, tracing: Tracing | None = None
) -> Iterator[LiveServer]:
    """Run an app under uvicorn for a block, with these prompts published (where it needs no key)."""
    app = create_app(settings, tracing=tracing)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", http="h11"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive(), "the server starts")
            assert server.started
            live = LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", app, folder)
            with live.http() as http:
                for name, content in (prompts or {}).items():
                    published = http.put(f"/v1/prompts/{name}", content=content)
                    assert published.status_code == 201, published.text
            yield live
        finally:
            server.should_exit = True
            thread.join(timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="session")
def server(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """An open server on loopback with six prompts: p0..p3 soft, p4 and p5 prefixes."""
    folder = tiny_models["llama"]
    settings = Settings(
        model=str(folder), store=str(tmp_path_factory.mktemp("store")), max_queue=24, drain_seconds=1, training="off"
    )
    prompts = {f"p{number}": artifact.content for number, artifact in enumerate(library(folder)[:6])}
    with serve(settings, folder, prompts=prompts) as live:
        yield live


@pytest.fixture(scope="session")
def prompts(server: LiveServer) -> tuple[PromptArtifact, ...]:
    """The artifacts behind p0..p5."""
    return library(server.folder)[:6]


@pytest.fixture(scope="session")
def two_tenants(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with two tenants and an admin."""
    settings = Settings(
        model=str(tiny_models["llama"]),
        store=str(tmp_path_factory.mktemp("two")),
        api_keys=SecretStr("a:key-tenant-a,b:key-tenant-b"),
        admin_key=SecretStr("key-admin-1"),
        drain_seconds=0,
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live


@pytest.fixture(scope="session")
def tenanted(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with an admin's key, for tests that make tenants of their own; it takes jobs and runs none."""
    settings = Settings(
        model=str(tiny_models["llama"]),
        store=str(tmp_path_factory.mktemp("tenanted")),
        admin_key=SecretStr(ADMIN_KEY),
        drain_seconds=0,
        training="worker",
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live


@pytest.fixture(scope="session")
def admin(tenanted: LiveServer) -> Iterator[Client]:
    """The admin of `tenanted`."""
    with Client(tenanted.url, api_key=ADMIN_KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def trainer(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """A server that takes training jobs."""
    from tests.api.training_server import serve_training  # which uses this module

    yield from serve_training(tiny_models["llama"], tmp_path_factory.mktemp("training"))


@pytest.fixture
def no_open_jobs(trainer: TrainingServer) -> Iterator[None]:
    """Leave no job to be claimed by another test."""
    yield
    with trainer.sdk() as sdk:
        for job in sdk.fine_tuning.jobs.list(limit=100):
            if job.status in ("queued", "running", "paused"):
                sdk.fine_tuning.jobs.cancel(job.id)
