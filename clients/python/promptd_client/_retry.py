"""When a request is sent again: where it cannot have been done, or where doing it twice is as good as once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import httpx

from promptd_client.errors import APIError, QuotaError

MAX_RETRY_AFTER_SECONDS = 30.0
"""A server that asks for more patience than this gets its error passed on."""

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_REFUSED = frozenset({429, 503})
_TEMPORARY = frozenset({429, 502, 503, 504})


class RetryLimits(TypedDict):
    """The arguments of stamina's callers that are ours."""

    attempts: int
    timeout: float
    wait_jitter: float


def retry_limits(max_retries: int) -> RetryLimits:
    """Return the limits of one call; 0 retries send everything once."""
    return {"attempts": max_retries + 1, "timeout": 60.0, "wait_jitter": 0.2}


def retry_hook(is_idempotent: bool) -> Callable[[Exception], bool | float]:
    """Return stamina's hook: False gives up, True waits as stamina does, a number waits that many seconds.

    A refusal with Retry-After says that nothing was done, so that even a generation may be sent again. A stream
    comes here only until its status is known: what has begun to arrive is never asked for twice.
    """

    def decide(error: Exception) -> bool | float:
        if isinstance(error, _NOT_SENT):
            return True
        if isinstance(error, QuotaError):
            return False
        if isinstance(error, APIError):
            wait = error.retry_after_seconds
            if error.status in _REFUSED and wait is not None:
                return wait if wait <= MAX_RETRY_AFTER_SECONDS else False
            return is_idempotent and error.status in _TEMPORARY
        return is_idempotent and isinstance(error, httpx.TransportError)

    return decide
