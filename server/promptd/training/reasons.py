"""Why a job failed, for a person to read."""

from __future__ import annotations

from promptd_store import PromptRecord, StoreError

from promptd.errors import InvalidRequestError, PromptdError
from promptd.jobs import JobError, JobSpec
from promptd.training.passes import is_out_of_memory
from promptd.training.result import TrainingResult
from promptd.training.scores import Scores


def reason_of(error: Exception) -> JobError:
    """Return what a job's owner is told of an error: what went wrong, in a word for programs too, and where."""
    if isinstance(error, (PromptdError, StoreError)):
        return JobError(error.code, error.message, error.param)
    if is_out_of_memory(error):
        return JobError("out_of_memory", "one row does not fit into the memory that is left for training")
    return JobError("internal_error", f"{type(error).__name__}: {error}")


def not_better(spec: JobSpec, result: TrainingResult, replaced: PromptRecord | None) -> InvalidRequestError:
    """Return why a prompt is not published that is worse than the one it would replace, or than none."""
    is_bare = replaced is None or result.bare.rank > result.before.rank
    bare = "the chain in front of it alone" if spec.behind else "the bare model"
    rival = bare if is_bare or replaced is None else f"{replaced.name}@{replaced.number}"
    return InvalidRequestError(
        f"not published: {_told(result.report)} on {result.report.num_rows} held-out rows, {rival} has "
        f"{_told(result.bare if is_bare else result.before)}; publish_worse publishes it all the same",
        param="publish_worse",
        code="prompt_not_better",
    )


def _told(scores: Scores) -> str:
    accuracy = "" if scores.accuracy is None else f"accuracy {scores.accuracy:.3f}, "
    return f"{accuracy}loss {scores.loss:.4f}"
