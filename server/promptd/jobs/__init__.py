"""Training jobs and their files, durable in the store: no model, no HTTP."""

from promptd.jobs.claims import HEARTBEAT_SECONDS, LEASE_SECONDS, MAX_ATTEMPTS, Claim, JobClaims, JobData
from promptd.jobs.erasure import JobEraser
from promptd.jobs.events import JobEvent
from promptd.jobs.files import FileRecord, TrainingFiles
from promptd.jobs.holdings import TRAINING_JOBS, TRAINING_STEPS, JobsHeld, steps_of, trained_prefix
from promptd.jobs.ledger import JobLimits, JobRef
from promptd.jobs.queue import JobQueue, JobRequest
from promptd.jobs.record import (
    TRANSITIONS,
    Checkpoint,
    JobError,
    JobProgress,
    JobRecord,
    JobResult,
    JobSpec,
    JobState,
)

__all__ = [
    "HEARTBEAT_SECONDS",
    "LEASE_SECONDS",
    "MAX_ATTEMPTS",
    "TRAINING_JOBS",
    "TRAINING_STEPS",
    "TRANSITIONS",
    "Checkpoint",
    "Claim",
    "FileRecord",
    "JobClaims",
    "JobData",
    "JobEraser",
    "JobError",
    "JobEvent",
    "JobLimits",
    "JobProgress",
    "JobQueue",
    "JobRecord",
    "JobRef",
    "JobRequest",
    "JobResult",
    "JobSpec",
    "JobState",
    "JobsHeld",
    "TrainingFiles",
    "steps_of",
    "trained_prefix",
]
