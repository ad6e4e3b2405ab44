"""What one request leaves behind: whose it was, which prompts it named, where its time went. Never what it said.

Logs, traces and the `Server-Timing` header (https://www.w3.org/TR/server-timing/) are made of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import Scope

from promptd.engine.request import Output, RequestTimings

PHASES = ("store", "queue", "load", "prefill", "decode")
"""Looking prompts up; waiting for a place in the batch; making K/V of absent prompts; reading; writing."""
MAX_KEPT = 64
"""Runs and lookups that a trail keeps of one request; the first ones."""
_TRAIL = "promptd.trail"
_OF_A_PERSON = "/v1/users/"


@dataclass(frozen=True, slots=True)
class Lookup:
    """One step through the store's side; seconds on the monotonic clock."""

    what: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Run:
    """One text in the engine."""

    timings: RequestTimings
    num_prompt_tokens: int
    num_output_tokens: int
    num_virtual_tokens: int
    num_cached_tokens: int
    finish_reason: str | None


@dataclass(slots=True)
class Trail:
    """Kept with a request from its headers to its last byte."""

    operation: str = ""
    """OpenTelemetry's word for what was asked; empty for what asks no model."""
    tenant: str = ""
    model: str = ""
    """As the answer names it."""
    prompts: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    error_code: str = ""
    """Of the error that was the answer; empty where there was none."""

    @contextmanager
    def looking_up(self, what: str) -> Iterator[None]:
        """Time a step through the store's side."""
        began = time.monotonic()
        try:
            yield
        finally:
            if len(self.lookups) < MAX_KEPT:
                self.lookups.append(Lookup(what, began, time.monotonic()))

    def take(self, last: Output, num_output_tokens: int = 0, finish_reason: str | None = None) -> None:
        """Take in the last output of a run."""
        if last.timings is not None and len(self.runs) < MAX_KEPT:
            self.runs.append(
                Run(
                    last.timings,
                    last.num_prompt_tokens,
                    num_output_tokens,
                    last.num_virtual_tokens,
                    last.num_cached_tokens,
                    finish_reason,
                )
            )

    def phases(self) -> Mapping[str, float]:
        """Return seconds by phase, of the run that ended last; without those that were not reached."""
        found: dict[str, float] = {}
        if self.lookups:
            found["store"] = sum(lookup.ended - lookup.began for lookup in self.lookups)
        ended = [run.timings for run in self.runs if run.timings.finished is not None]
        if ended:
            last = max(ended, key=lambda timings: timings.finished or 0.0)
            found |= {phase: end - begin for phase, begin, end in spans_of(last)}
        return found

    def milliseconds(self) -> dict[str, float]:
        """Return the phases for people's eyes."""
        return {phase: round(1000 * seconds, 3) for phase, seconds in self.phases().items()}

    def server_timing(self) -> str:
        """Return the value of the header; empty where nothing was timed."""
        return ", ".join(f"{phase};dur={milliseconds:.3f}" for phase, milliseconds in self.milliseconds().items())


def spans_of(timings: RequestTimings) -> Iterator[tuple[str, float, float]]:
    """Yield (phase, begin, end) of a run's phases in the engine, as far as it came."""
    points = (timings.arrived, timings.scheduled, timings.reading, timings.first_token, timings.finished)
    for phase, begin, end in zip(PHASES[1:], points, points[1:], strict=False):
        if begin is not None and end is not None:
            yield phase, begin, end


def trail_of(request: Request) -> Trail:
    """Dependency: the trail of this request."""
    return trail_in(request.scope)


def trail_in(scope: Scope) -> Trail:
    """Return the trail that a scope carries; the first who asks begins it."""
    trail: Trail = scope.setdefault(_TRAIL, Trail())
    return trail


def shown_path(path: str) -> str:
    """Return a path as logs and traces show it: without the name of a person, who may have just been erased."""
    return f"{_OF_A_PERSON}…" if path.startswith(_OF_A_PERSON) else path
