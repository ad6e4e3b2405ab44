"""A store whose every call is timed."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any, cast

from promptd_store import Store, StoreError

OPERATIONS = frozenset(
    name
    for name, member in vars(Store).items()
    # A subscription and the end last as long as somebody wants them to.
    if inspect.iscoroutinefunction(member) and not name.startswith("_") and name not in ("subscribe", "close")
)
Observer = Callable[[str, float, bool], None]
"""Takes the operation, its seconds, and whether the store failed; a check or lease that failed is an answer."""


def timed(store: Store, observe: Observer) -> Store:
    """Return a store that does the same and tells of every call."""
    return cast(Store, _TimedStore(store, observe))


class _TimedStore:
    def __init__(self, store: Store, observe: Observer) -> None:
        self._store = store
        self._observe = observe

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if name not in OPERATIONS:
            return call

        @functools.wraps(call)
        async def timed_call(*args: Any, **kwargs: Any) -> Any:
            began, is_failure = time.monotonic(), False
            try:
                return await call(*args, **kwargs)
            except StoreError as error:
                is_failure = error.status >= 500
                raise
            finally:
                self._observe(name, time.monotonic() - began, is_failure)

        setattr(self, name, timed_call)  # the next call finds it without asking here
        return timed_call
