"""Clients that stream one answer after another and write down how each ended."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import httpx

PATIENCE_SECONDS = 120
"""What a busy machine may take for one answer to each client."""


@dataclass(frozen=True)
class Ended:
    """One request: what went wrong, if anything."""

    started: float
    ended: float
    fault: str | None
    version: str | None = None
    text: str = ""


@dataclass
class Load:
    """So many clients at once, each with one connection, until `stop`."""

    url: str
    num_clients: int
    model: str
    max_tokens: int = 12
    ended: list[Ended] = field(default_factory=list)
    is_stopping: bool = False

    async def run(self) -> None:
        """Send requests until stopped."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            await asyncio.gather(*(self._client(http) for _ in range(self.num_clients)))

    async def until_more(self, count: int = 0, *, since: float = 0.0) -> None:
        """Wait until so many more requests have ended, one for each client by default, which began after `since`."""
        already = len(self.ended)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while sum(one.started >= since for one in self.ended[already:]) < (count or self.num_clients):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    @property
    def faults(self) -> list[Ended]:
        """The requests that did not end as promised."""
        return [one for one in self.ended if one.fault is not None]

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self.is_stopping:
            started = time.monotonic()
            fault, version, text = await self._one(http)
            self.ended.append(Ended(started, time.monotonic(), fault, version, text))
            if fault is not None:
                await asyncio.sleep(0.05)

    async def _one(self, http: httpx.AsyncClient) -> tuple[str | None, str | None, str]:
        body = {
            "model": self.model, "prompt": "the quick", "max_tokens": self.max_tokens, "stream": True,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        text, version, finish = "", None, None
        try:
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    return f"status {answer.status_code}", None, ""
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        return (None if finish else "no finish_reason"), version, text
                    if line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            return event["error"]["code"], None, text
                        for choice in event["choices"]:
                            text += choice["text"]
                            finish = choice["finish_reason"] or finish
                        version = str(event.get("prompt_versions") or version)
                return "ended without [DONE]", None, text
        except httpx.HTTPError as error:
            return type(error).__name__, None, text
