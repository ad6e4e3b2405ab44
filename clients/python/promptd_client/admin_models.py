"""What the server answers to admins."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from promptd_client.models import Reply


class ApiKey(Reply):
    """An API key as it is listed; times are seconds since 1970."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    label: str = ""
    state: Literal["active", "expired", "revoked"]
    created: int
    expires: int | None = None
    revoked: int | None = None


class IssuedKey(ApiKey):
    """A new key: `key` is in the clear and never shown again."""

    key: str


class TenantLimits(Reply):
    """What a tenant may use; None is no limit of its own. A newer server may know more limits."""

    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    max_queued_requests: int | None = None
    max_resident_bytes: int | None = None
    max_prompts: int | None = None
    max_stored_bytes: int | None = None
    max_training_jobs: int | None = None
    training_steps_per_day: int | None = None


class Acknowledgement(Reply):
    """Whether one server has forgotten what was erased."""

    id: str
    host: str
    pid: int
    has_forgotten: bool
    is_silent: bool
    """It was not heard of for 15 s: killed, and its memory with it, or cut off from the store."""


class Tenant(Reply):
    """One tenant as an admin sees it."""

    id: str
    limits: TenantLimits
    active_keys: tuple[str, ...] = ()
    held: dict[str, int] | None = None
    """What it holds of what there are quotas for; not in lists."""
    erased: int | None = None
    """When everything of it was erased, in seconds since 1970."""
    servers: tuple[Acknowledgement, ...] | None = None
    """Of an erased tenant: the servers that may have had something of it in memory."""


class UsageCounts(Reply):
    """What was served."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    virtual_tokens: int = 0
    cached_tokens: int = 0
    training_tokens: int = 0
    stored_byte_days: int = 0
    """Bytes that lay in the store, summed over the days."""


class UsageEntry(UsageCounts):
    """What was served on one day, by one key, under one prompt (empty: the bare model)."""

    tenant: str
    day: str
    key_id: str
    prompt: str


class UsageReport(Reply):
    """What was served from one day to another."""

    first_day: str = Field(alias="from")
    last_day: str = Field(alias="to")
    data: tuple[UsageEntry, ...]
    total: UsageCounts


class Drain(Reply):
    """How far a server is with leaving its load balancer."""

    status: Literal["serving", "draining"]
    seconds: float | None = None
    """For how long its readiness probe has said no."""
    leave_seconds: float
    """How long it should, for every balancer to notice."""
    requests_running: int
    requests_waiting: int

    @property
    def is_done(self) -> bool:
        """Whether it can be stopped and nobody notices."""
        is_left = self.seconds is not None and self.seconds >= self.leave_seconds
        return is_left and not self.requests_running and not self.requests_waiting
