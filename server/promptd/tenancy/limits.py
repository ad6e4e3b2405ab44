"""What a tenant may use. None is no limit of the tenant's own; the server's limits hold for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from promptd_store import PROMPTS, STORED_BYTES

from promptd.errors import InvalidRequestError
from promptd.jobs import TRAINING_JOBS, TRAINING_STEPS

MAX_LIMIT = 1 << 53
"""Numbers above are no exact JSON numbers any more."""
MAX_WEIGHT = 1e6


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """Everything that is set for one tenant. Checked on creation."""

    weight: float = 1.0
    """Part of the batch beside other tenants."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Text tokens in and out, reserved before a request runs; what it did not use is given back."""
    max_concurrent_requests: int | None = None
    """Inference requests at a time, on all servers together."""
    max_queued_requests: int | None = None
    """Requests that may wait beside those that run, on all servers together."""
    max_resident_bytes: int | None = None
    """Of its prompts' keys and values in the memory of each server."""
    max_prompts: int | None = None
    """Names of prompts."""
    max_stored_bytes: int | None = None
    """Of all versions of prompts, of training files, and of what open jobs keep."""
    max_training_jobs: int | None = None
    """Jobs that have not ended."""
    training_steps_per_day: int | None = None
    """Of jobs made on one day (UTC): the most that they can take, less what they turned out not to take."""

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise InvalidRequestError(f"weight must be a number, got {self.weight!r}", param="weight")
        if not 0.0 < self.weight <= MAX_WEIGHT:
            raise InvalidRequestError(
                f"weight must be above 0 and at most {MAX_WEIGHT:g}, got {self.weight}", param="weight"
            )
        for name in LIMIT_NAMES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LIMIT:
                raise InvalidRequestError(
                    f"{name} must be a whole number from 0 to {MAX_LIMIT} or null, got {value!r}", param=name
                )

    def changed(self, changes: Mapping[str, Any]) -> TenantLimits:
        """Return the limits with some of them set; null takes a limit away."""
        unknown = sorted(set(changes) - {"weight", *LIMIT_NAMES})
        if unknown:
            raise InvalidRequestError(f"unknown limits: {', '.join(unknown)}", param=unknown[0], code="unknown_field")
        plain = {**asdict(self), **changes}
        if plain["weight"] is None:
            plain["weight"] = 1.0
        return TenantLimits(**plain)


QUOTAS = {
    "max_prompts": PROMPTS,
    "max_stored_bytes": STORED_BYTES,
    "max_training_jobs": TRAINING_JOBS,
    "training_steps_per_day": TRAINING_STEPS,
}
"""Limits of what is held, and the counts that the store compares with them in the step that would add to them."""
LIMIT_NAMES = tuple(one.name for one in fields(TenantLimits) if one.name != "weight")
NO_LIMITS = TenantLimits()
