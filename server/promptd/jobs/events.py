"""What happened to a job: entries of its append-only log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from promptd_store import Event

from promptd.jobs.record import JobState

Level = Literal["info", "warn", "error"]
Kind = Literal["message", "metrics", "state"]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry. `seq` and `created_at` are given by the log."""

    message: str
    level: Level = "info"
    kind: Kind = "message"
    data: Mapping[str, Any] = field(default_factory=dict)
    """For `metrics` the progress, for `state` the new state."""
    seq: int = 0
    created_at: float = 0.0
    """Seconds since 1970."""

    @property
    def ends_job(self) -> bool:
        """Whether the job has ended with this event."""
        return self.kind == "state" and JobState(self.data["state"]).is_ended

    def to_bytes(self) -> bytes:
        """Write what the log keeps."""
        plain = {"message": self.message, "level": self.level, "kind": self.kind, "data": dict(self.data)}
        return json.dumps(plain, allow_nan=False).encode()

    @classmethod
    def from_log(cls, event: Event) -> JobEvent:
        """Read an entry."""
        return cls(**json.loads(event.payload), seq=event.seq, created_at=event.at)


def state_event(state: JobState, message: str, level: Level = "info") -> JobEvent:
    """Return the event of a change of state."""
    return JobEvent(message, level, "state", {"state": state.value})
