"""One real server for the session: uvicorn on a free loopback port, a tiny model, the embedded store."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)


def serve(settings: Settings, folder: Path, *, tracing: Tracing | None = None) -> Iterator[LiveServer]:
    """Run an app under uvicorn until the generator is closed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(settings, tracing=tracing)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    try:
        yield LiveServer(f"http://127.0.0.1:{port}", app, folder)
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="session")
def server(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """An open server on loopback with six prompts: p0..p3 soft, p4 and p5 prefixes."""
    folder = tiny_models["llama"]
    settings = Settings(
        model=str(folder), store=str(tmp_path_factory.mktemp("store")), max_queue=24, drain_seconds=1, training="off"
    )
    for live in serve(settings, folder):
        with live.http() as http:
            for number, artifact in enumerate(library(folder)[:6]):
                assert http.put(f"/v1/prompts/p{number}", content=artifact.content).status_code == 201
        yield live


@pytest.fixture(scope="session")
def prompts(server: LiveServer) -> tuple[PromptArtifact, ...]:
    """The artifacts behind p0..p5."""
    return library(server.folder)[:6]


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
    yield from serve(settings, tiny_models["llama"])


@pytest.fixture(scope="session")
def tenants_admin(tenanted: LiveServer) -> Iterator[Client]:
    """That server's admin."""
    with Client(tenanted.url, api_key=ADMIN_KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def trainer(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """A server that takes training jobs."""
    from tests.api.training_server import serve_training  # which uses this module

    yield from serve_training(tiny_models["llama"], tmp_path_factory.mktemp("training"))
