"""Why a job failed, for a person to read."""

from __future__ import annotations

from promptd_store import StoreError

from promptd.errors import PromptdError
from promptd.jobs import JobError
from promptd.training.passes import is_out_of_memory


def reason_of(error: Exception) -> JobError:
    """Return what a job's owner is told of an error: what went wrong, in a word for programs too, and where."""
    if isinstance(error, (PromptdError, StoreError)):
        return JobError(error.code, error.message, error.param)
    if is_out_of_memory(error):
        return JobError("out_of_memory", "one row does not fit into the memory that is left for training")
    return JobError("internal_error", f"{type(error).__name__}: {error}")
