"""A server that takes training jobs, with two tenants and an admin; and a worker that only pretends to train."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import openai
from promptd_store import EmbeddedStore

from promptd.jobs import JobClaims, JobResult
from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.harness import library

KEYS = {"acme": "acme-key-0001", "eve": "eve-key-00001", "admin": "admin-key-0001"}
MAX_UPLOAD_BYTES = 300_000

T = TypeVar("T")


@dataclass
class TrainingServer:
    """A live server and the folder of its store."""

    live: LiveServer
    store: Path

    def http(self, who: str = "acme") -> httpx.Client:
        """A plain client of a tenant."""
        return self.live.http(Authorization=f"Bearer {KEYS[who]}")

    def sdk(self, who: str = "acme") -> openai.OpenAI:
        """OpenAI's client of a tenant."""
        return openai.OpenAI(base_url=f"{self.live.url}/v1", api_key=KEYS[who], max_retries=0)

    def work(self, what: Callable[[JobClaims], Awaitable[T]]) -> T:
        """Do something as a worker in another process would: over its own connection to the store."""

        async def run() -> T:
            store = EmbeddedStore(self.store)
            try:
                return await what(JobClaims(store, self.live.model.spec.fingerprint, "pretender"))
            finally:
                await store.close()

        return asyncio.run(run())


def serve_training(folder: Path, store: Path) -> Iterator[TrainingServer]:
    """Run the server; the tenant acme has the prompt `p0`."""
    settings = Settings.model_validate(
        {
            "model": str(folder),
            "store": str(store),
            "drain_seconds": 0,
            "training": "worker",
            "max_upload_bytes": MAX_UPLOAD_BYTES,
            "api_keys": f"acme:{KEYS['acme']},eve:{KEYS['eve']}",
            "admin_key": KEYS["admin"],
        }
    )
    with serve(settings, folder) as live:
        server = TrainingServer(live, store)
        with server.http() as http:
            assert http.put("/v1/prompts/p0", content=library(folder)[0].content).status_code == 201
        yield server


def result(prompt: str) -> JobResult:
    """What a pretended training came to."""
    return JobResult(prompt, "sha256:" + "e" * 64, 1, 40, 7, "sha256:" + "d" * 64, {"accuracy": 0.5}, {"accuracy": 0.9})
