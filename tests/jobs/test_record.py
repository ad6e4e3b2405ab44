"""A job's record: its states and its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from promptd.errors import ConflictError, InvalidRequestError
from promptd.jobs import TRANSITIONS, Checkpoint, JobError, JobProgress, JobRecord, JobSpec, JobState
from tests.jobs.conftest import BASE, METHOD, result_of

JOB = JobRecord("ftjob-1", "acme", BASE, JobSpec(METHOD, rows_digest="sha256:0"), 1.5)
ALLOWED = {
    "queued": "running paused cancelled succeeded failed",
    "running": "queued running paused cancelling succeeded failed",
    "paused": "queued cancelled succeeded failed",
    "cancelling": "cancelled succeeded failed",
    "cancelled": "",
    "succeeded": "",
    "failed": "",
}


def test_every_step_between_states() -> None:
    """Exactly the steps of the table are possible; every other one is a conflict that names both states."""
    assert {one.value: set(TRANSITIONS[one]) for one in JobState} == {
        state: set(to.split()) for state, to in ALLOWED.items()
    }
    for before in JobState:
        for after in JobState:
            job = replace(JOB, state=before)
            if after.value in ALLOWED[before].split():
                assert job.moved(after, 7.0).state is after
            else:
                with pytest.raises(ConflictError, match=f"is {before.value}; it cannot become {after.value}"):
                    job.moved(after, 7.0)


def test_ending_lets_go_of_the_data() -> None:
    """An ended job has an end time, and names neither rows nor checkpoint any more."""
    job = replace(JOB, state=JobState.RUNNING, checkpoint=Checkpoint("sha256:1", 3, 10, 2.0))
    for end in (JobState.SUCCEEDED, JobState.FAILED):
        ended = job.moved(end, 7.0)
        assert (ended.finished_at, ended.checkpoint, ended.spec.rows_digest) == (7.0, None, None)
        assert end.is_ended and not job.state.is_ended


def test_started_once() -> None:
    """The time of the first start stays through later attempts."""
    first = JOB.moved(JobState.RUNNING, 2.0)
    assert first.moved(JobState.QUEUED, 3.0).moved(JobState.RUNNING, 4.0).started_at == 2.0


def test_bytes_round_trip() -> None:
    """Every field survives, and label words keep their order."""
    words = {"z": " yes", "a": " no"}
    job = replace(
        JOB,
        spec=replace(JOB.spec, name="tone", template="{text}", label_words=words, settings={"seed": 1}, priority=9),
        progress=JobProgress(3, 10, loss=0.5),
        checkpoint=Checkpoint("sha256:1", 3, 10, 2.0),
        error=JobError("x", "y", "z"),
        result=result_of(JOB),
        idempotency_key="k",
        wish_digest="d",
    )
    again = JobRecord.from_bytes(job.to_bytes())
    assert again == job and list(again.spec.label_words or ()) == ["z", "a"]


def test_prompt_name() -> None:
    """The prompt is called as asked, else after the job."""
    assert JOB.prompt_name == "ft-ftjob-1"
    assert replace(JOB, spec=JobSpec(METHOD, "tone")).prompt_name == "tone"


@pytest.mark.parametrize("priority", [-1, 10])
def test_priority_is_bounded(priority: int) -> None:
    """A priority out of range names field and value."""
    with pytest.raises(InvalidRequestError, match=f"priority must be 0 to 9, got {priority}"):
        JobSpec(METHOD, priority=priority)
