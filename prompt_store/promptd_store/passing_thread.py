"""Tensor work beside the thread that runs the model, in threads that end with it.

OpenMP gives every thread that computes a team of workers and keeps it until that thread ends. With more workers than
cores in a process none of them waits actively any more, and each small product of the model then pays for waking its
team: on two cores a second team makes a small model's training 1.7 times as slow. So a process has one lasting thread
that computes, the one that runs its model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_passing_thread(work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Return what `work` returns, or raise what it raises."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            failed.append(error)

    thread = threading.Thread(target=run, name="promptd-passing", daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


async def compute(work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Await `work` in a passing thread; as many at once as asyncio's own threads."""
    return await asyncio.to_thread(partial(in_passing_thread, work, *args, **kwargs))
