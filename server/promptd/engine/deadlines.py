"""Until when a request may wait for its start, for its first token and for its end. No torch."""

from __future__ import annotations

from promptd.engine.config import EngineConfig
from promptd.engine.sequence import Sequence
from promptd.errors import DeadlineExceededError, OverloadedError, PromptdError


def overdue(seq: Sequence, config: EngineConfig, now: float) -> PromptdError | None:
    """Return the error of a sequence that one of its deadlines has passed; `now` is on the monotonic clock."""
    queue, first = config.max_queue_seconds, config.max_first_token_seconds
    if seq.deadline is not None and now > seq.deadline:
        return DeadlineExceededError("the request's deadline passed before it was done")
    if queue is not None and seq.scheduled is None and now - seq.arrived > queue:
        message = f"the request waited for {queue:g} seconds and was not started"
        return OverloadedError(message, code="queue_timeout", retry_after_seconds=1)
    if first is not None and seq.is_generation and seq.first_token is None and now - seq.arrived > first:
        message = f"no token was made within {first:g} seconds"
        return DeadlineExceededError(message, code="first_token_deadline_exceeded")
    return None


def next_deadline(seq: Sequence, config: EngineConfig, now: float) -> float | None:
    """Return the first moment after `now` at which the sequence may be overdue; None where there is none."""
    waits = (config.max_queue_seconds, config.max_first_token_seconds)
    ends = [seq.arrived + seconds for seconds in waits if seconds is not None]
    if seq.deadline is not None:
        ends.append(seq.deadline)
    return min((end for end in ends if end > now), default=None)
