"""Who is asked: a running server, over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from promptd.bench.target import Reading
from promptd.bench.workload import SAFE_VOCAB_SIZE, BenchPrompt, BenchRequest

_EVENT, _DONE = "data: ", "data: [DONE]"
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ServerError(Exception):
    """The server refused, or its stream broke."""


class ServerTarget:
    """A promptd server. Its own prompts are used as they are; made-up ones are uploaded and at the end deleted."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        vocab_size: int = SAFE_VOCAB_SIZE,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.description = base
        self.vocab_size = vocab_size
        self._http = httpx.AsyncClient(
            base_url=base,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=concurrency + 4, max_keepalive_connections=concurrency + 4),
            transport=transport,
        )
        self._uploaded: list[str] = []

    async def open(self, prompts: Sequence[BenchPrompt]) -> None:
        """Check that somebody answers, and upload the prompts that are not there."""
        models = _checked(await self._http.get("/v1/models")).json()["data"]
        base = next((model["id"] for model in models if model.get("parent") is None), "?")
        self.description = f"{base} at {self.description}"
        for prompt in prompts:
            if prompt.artifact is not None:
                path = f"/v1/prompts/{prompt.name}"
                _checked(await self._http.put(path, content=bytes(prompt.artifact.content)))
                self._uploaded.append(path)

    async def stream(self, request: BenchRequest) -> AsyncIterator[int]:
        """Yield the number of new tokens, event by event."""
        body: dict[str, Any] = {
            "prompt": list(request.token_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stop": [],
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if request.prompt.name is not None:
            body["model"] = request.prompt.name
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                await response.aread()
                _checked(response)
            async for line in response.aiter_lines():
                if line == _DONE:
                    return
                if line.startswith(_EVENT):
                    yield _num_tokens(json.loads(line.removeprefix(_EVENT)))
        raise ServerError("the stream ended before its last event")

    async def read(self) -> Reading:
        """Read the server's metrics; a server that hides them gives none."""
        try:
            response = await self._http.get("/metrics")
        except httpx.TransportError:
            return Reading()
        if not response.is_success:
            return Reading()
        values = _samples(response.text)
        return Reading(
            _whole(values.get("promptd_prompt_cache_hits_total")),
            _whole(values.get("promptd_prompt_cache_misses_total")),
            _whole(values.get("process_resident_memory_bytes")),
        )

    async def close(self) -> None:
        """Delete what was uploaded."""
        try:
            for path in self._uploaded:
                await self._http.delete(path)
        finally:
            await self._http.aclose()


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = response.text[:200]
    raise ServerError(f"{response.request.url.path}: {response.status_code}: {reason}")


def _num_tokens(event: dict[str, Any]) -> int:
    if "error" in event:
        raise ServerError(str(event["error"].get("message", event["error"])))
    return sum(len(choice.get("token_ids") or ()) for choice in event["choices"])


def _samples(text: str) -> dict[str, float]:
    """Read the plain samples (those without labels) of Prometheus' text format."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "{" not in name}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
