"""What the routes work with, made once by `create_app`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from fastapi import Request
from promptd_store import PromptCatalog

from promptd.api.leaving import Leaving
from promptd.api.trail import Trail
from promptd.engine.async_engine import AsyncEngine
from promptd.engine.request import RequestTimings
from promptd.jobs import JobQueue, TrainingFiles
from promptd.modeling import FrozenModel
from promptd.roster import Roster
from promptd.suspicion import Quarantine
from promptd.tenancy import CallLog, Eraser, Gate, KeyOffice, KeyRing, Principal, TenantDirectory, Visit
from promptd.vetting import Vetting

Uploads = Literal["none", "trained-here", "any"]
_MAX_REQUEST_ID_CHARS = 128
VISIT = "promptd.visit"
"""Where a request's scope keeps its visit."""


@dataclass(frozen=True)
class Limits:
    """Bounds that the settings give to the routes."""

    max_body_bytes: int
    max_upload_bytes: int
    spool_folder: Path | None
    """Where large bodies wait until they are checked; None: the system's folder for temporary files."""
    request_timeout_seconds: float
    drain_seconds: float
    leave_seconds: float
    max_prefix_tokens: int
    """Virtual tokens of an uploaded prompt."""
    uploads: Uploads
    """Whose learned prompts are taken: nobody's, those that were trained here, or any."""
    stall_seconds: float
    """Longest time in which a client sends nothing of its body, or reads nothing of its answer."""
    stream_interval_seconds: float
    """Tokens of a stream that come within so long leave together."""


@dataclass(kw_only=True)
class Services:
    """The engine with its model, the prompts, training, the tenants, and what tells of all of it."""

    engine: AsyncEngine
    limits: Limits

    catalog: PromptCatalog
    vetting: Vetting
    quarantine: Quarantine

    files: TrainingFiles
    jobs: JobQueue | None
    """None where this server takes no training jobs."""

    keys: KeyRing
    key_office: KeyOffice
    tenants: TenantDirectory
    gate: Gate
    eraser: Eraser

    roster: Roster
    calls: CallLog
    observe: Callable[[RequestTimings], None]
    """Takes the timings of every finished generation."""
    observe_gap: Callable[[float], None]
    """Takes the seconds between two tokens of a generation."""
    render_metrics: Callable[[], bytes]
    trace: Callable[[Trail], None]
    """Takes the trail of every request that the engine worked for."""

    leaving: Leaving = field(default_factory=Leaving)
    is_draining: bool = False
    """Takes no new work."""
    started_at: float = field(default_factory=time.time)

    async def drain(self) -> None:
        """Take no new work, let what runs finish for a while, end the rest with a typed error."""
        self.is_draining = True
        await self.engine.shutdown(self.limits.drain_seconds)

    @property
    def model(self) -> FrozenModel:
        """The frozen base model."""
        return self.engine.engine.model

    @property
    def max_evaluating(self) -> int:
        """Requests that evaluations may have open: half of the rows that run at once are for everybody else."""
        return max(1, self.engine.engine.config.max_num_seqs // 2)

    @cached_property
    def evaluation_turns(self) -> asyncio.Semaphore:
        """What all evaluations share."""
        return asyncio.Semaphore(self.max_evaluating)

    @cached_property
    def neighbor_turns(self) -> asyncio.Semaphore:
        """One search through the vocabulary at a time, whoever asks: the model's thread has the other processors."""
        return asyncio.Semaphore(1)


def services_of(request: Request) -> Services:
    """Dependency: the services of this app."""
    services: Services = request.app.state.services
    return services


def principal_of(request: Request) -> Principal:
    """Dependency: the caller, as the route's guard found it."""
    principal: Principal = request.state.principal
    return principal


def visit_of(request: Request) -> Visit:
    """Dependency: what the caller takes and is counted for, as the route's guard opened it."""
    visit: Visit = request.scope[VISIT]
    return visit


def new_id(prefix: str) -> str:
    """A server-made id; a client's own id is never used as a key."""
    return f"{prefix}-{secrets.token_hex(16)}"


def request_id(given: str | None) -> str:
    """Return the client's own id, where it is short and plain (a label only, never a key), or a new one."""
    if given and len(given) <= _MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable() and given.strip():
        return given
    return new_id("req")
