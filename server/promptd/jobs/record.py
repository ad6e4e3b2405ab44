"""What a training job is: what was asked for, how far it is, what came of it. Its states and how they follow."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from promptd_store.schema import known_fields, read_fields, stamped, unknown_fields

from promptd.errors import ConflictError, InvalidRequestError

MAX_PRIORITY = 9


class JobState(enum.StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_ended(self) -> bool:
        """Whether nothing will ever happen to it again."""
        return not TRANSITIONS[self]


_Q, _R, _P, _C = JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.CANCELLING
_ENDS = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# A running job is paused at once; its worker notices a moment later and may have published its prompt by then. So a
# paused job, and one that was resumed in that moment, can still end. Running to running: the next worker takes over.
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({_R, _P}) | _ENDS,
    JobState.RUNNING: frozenset({_Q, _R, _P, _C, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.PAUSED: frozenset({_Q}) | _ENDS,
    JobState.CANCELLING: _ENDS,
    JobState.CANCELLED: frozenset(),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
}
"""Every legal step from one state to another."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a tenant asks for; never changes, except that rows given inline are let go when the job has ended."""

    method: Mapping[str, Any]
    """As on the wire: `{"type": "residual", "residual": {"hyperparameters": {…}}}`."""
    name: str | None = None
    """The prompt to publish; None: `ft-<job id>`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the trainer reads, as plain JSON."""
    training_file: str | None = None
    rows_digest: str | None = None
    """Blob of rows that came with the job, in the place of a training file."""
    rows_bytes: int = 0
    """Size of those rows."""
    num_steps: int = 0
    """The most steps that it takes: what it counts for in its tenant's steps of the day."""
    validation_file: str | None = None
    base_prompt: str | None = None
    """The stored prompt that training starts from."""
    behind: Sequence[str] = ()
    """Stored prompts that the new one is the next element of a chain to, from the chain's beginning; never changed."""
    distill: Mapping[str, Any] | None = None
    """The teacher, and what it is asked, where the job distills; it may then have no rows."""
    template: str | None = None
    label_words: Mapping[str, str] | None = None
    priority: int = 0
    """0 to 9, larger first; counts among the jobs of one tenant."""

    def __post_init__(self) -> None:
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise InvalidRequestError(f"priority must be 0 to {MAX_PRIORITY}, got {self.priority!r}", param="priority")


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: `message` for people, `code` for programs, `param` names the field."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far training is. All numbers are finite."""

    step: int
    num_steps: int
    num_tokens: int = 0
    """Tokens trained on so far."""
    loss: float | None = None
    """Nats per target token, as are all losses."""
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a job continues after its worker is gone."""

    digest: str
    step: int
    num_bytes: int
    saved_at: float


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job has published."""

    prompt: str
    version: str
    number: int
    best_step: int
    seed: int
    data_digest: str
    scores_before: Mapping[str, float]
    scores_after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job. Times are seconds since 1970."""

    id: str
    tenant: str
    base_fingerprint: str
    spec: JobSpec
    created_at: float
    state: JobState = JobState.QUEUED
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    """How often it was claimed since it last got further."""
    progress: JobProgress | None = None
    checkpoint: Checkpoint | None = None
    error: JobError | None = None
    result: JobResult | None = None
    idempotency_key: str | None = None
    wish_digest: str | None = None
    """Of what was asked for, to know it again under the same key."""
    key_id: str = ""
    """The API key that it was made with: training counts for it."""
    user: str | None = None
    """The end user of its tenant whom it and its prompt belong to, where it was said."""
    unknown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a newer release has written down here; it is left as it is."""

    @property
    def prompt_name(self) -> str:
        """The prompt that it publishes."""
        return self.spec.name or f"ft-{self.id}"

    @property
    def files(self) -> set[str]:
        """The files that it reads."""
        return {file for file in (self.spec.training_file, self.spec.validation_file) if file is not None}

    @property
    def digests(self) -> set[str]:
        """The blobs that are its own."""
        own = (self.spec.rows_digest, self.checkpoint.digest if self.checkpoint else None)
        return {digest for digest in own if digest is not None}

    @property
    def held_bytes(self) -> int:
        """What is kept for it while it is open, beside its record."""
        return self.spec.rows_bytes + (self.checkpoint.num_bytes if self.checkpoint else 0)

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far."""
        return self.progress.num_tokens if self.progress else 0

    @property
    def num_steps_left(self) -> int:
        """Steps that it may still take."""
        return max(0, self.spec.num_steps - (self.progress.step if self.progress else 0))

    def moved(self, state: JobState, at: float, **changes: Any) -> JobRecord:
        """Return the job in its next state; raises `ConflictError` where the table does not allow that."""
        if state not in TRANSITIONS[self.state]:
            raise ConflictError(
                f"job {self.id!r} is {self.state.value}; it cannot become {state.value}", code="job_state_conflict"
            )
        if state is JobState.RUNNING and self.started_at is None:
            changes["started_at"] = at
        if state.is_ended:
            spec = replace(self.spec, rows_digest=None, rows_bytes=0)
            changes |= {"finished_at": at, "checkpoint": None, "spec": spec}
        return replace(self, state=state, **changes)

    def let_go(self) -> JobRecord:
        """Return the job as it would have ended if it had never been run to an end."""
        spec = replace(self.spec, rows_digest=None, rows_bytes=0)
        return replace(self, state=JobState.CANCELLED, checkpoint=None, spec=spec)

    def to_bytes(self) -> bytes:
        """Write the record."""
        plain = asdict(self)
        written = stamped(plain, plain.pop("unknown"))
        return json.dumps(written, allow_nan=False).encode()  # not sorted: the order of label words counts

    @classmethod
    def from_bytes(cls, data: bytes) -> JobRecord:
        """Read what `to_bytes` wrote."""
        plain = read_fields(cls, data)
        plain["state"] = JobState(plain["state"])
        plain["unknown"]["spec"] = unknown_fields(JobSpec, plain["spec"])
        spec = JobSpec(**known_fields(JobSpec, plain["spec"]))
        plain["spec"] = replace(spec, behind=tuple(spec.behind))
        for name, kind in _PARTS.items():
            if plain[name] is not None:
                plain[name] = kind(**known_fields(kind, plain[name]))
        return cls(**plain)


_PARTS: Mapping[str, type[JobProgress | Checkpoint | JobError | JobResult]] = {
    "progress": JobProgress,
    "checkpoint": Checkpoint,
    "error": JobError,
    "result": JobResult,
}
