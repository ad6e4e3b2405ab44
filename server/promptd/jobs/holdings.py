"""What a tenant's jobs hold and use, counted in the step that changes them: jobs, bytes, steps of the day, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from promptd_store import STORED_BYTES, Add, Record, day_of, hold

from promptd.jobs.files import FileRecord
from promptd.jobs.keys import file_key, job_key
from promptd.jobs.record import JobRecord

TRAINING_JOBS = "training_jobs"
"""Jobs that have not ended."""
TRAINING_STEPS = "training_steps"
"""Steps of jobs made today: the most that they take, less what they turned out not to take."""


def steps_of(day: str) -> str:
    """Name of the count of one day's steps."""
    return f"{TRAINING_STEPS}:{day}"


def trained_prefix(tenant: str) -> str:
    """What the keys of a tenant's trained tokens begin with; behind it `day:key id:prompt`."""
    return f"{{{tenant}}}:trained:"


def holds(changes: Sequence[tuple[JobRecord | None, JobRecord]], now: float, *, is_limited: bool = True) -> list[Add]:
    """Return what to count where jobs of one tenant change, or come (from None)."""
    tenant, today = changes[0][1].tenant, day_of(now)
    held: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for before, after in changes:
        if before is None:
            held[steps_of(day_of(after.created_at))] += after.spec.num_steps
        else:
            held[TRAINING_JOBS] -= not before.state.is_ended
            held[STORED_BYTES] -= before.held_bytes
            if after.state.is_ended and today == day_of(after.created_at):
                held[steps_of(today)] -= after.num_steps_left
            counted = f"{today}:{after.key_id}:{after.prompt_name}"
            trained[counted] += after.num_tokens - before.num_tokens
        held[TRAINING_JOBS] += not after.state.is_ended
        held[STORED_BYTES] += after.held_bytes
    adds = [hold(tenant, what, amount, is_limited=is_limited) for what, amount in held.items() if amount]
    return adds + [Add(trained_prefix(tenant) + counted, amount) for counted, amount in trained.items() if amount]


class JobsHeld:
    """Counts a tenant's open jobs, what they keep, and its files. Show it all records."""

    def __init__(self, tenant: str) -> None:
        self.held: Counter[str] = Counter()
        self._jobs = job_key(tenant, "")
        self._files = file_key(tenant, "")

    def see(self, record: Record) -> None:
        """Count one record."""
        if record.key.startswith(self._jobs):
            job = JobRecord.from_bytes(record.value)
            self.held[TRAINING_JOBS] += not job.state.is_ended
            self.held[STORED_BYTES] += job.held_bytes
        elif record.key.startswith(self._files):
            self.held[STORED_BYTES] += FileRecord.from_bytes(record.value).num_bytes
