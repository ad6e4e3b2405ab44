"""How fast a job goes here: what its steps tell, as people want to hear it."""

from __future__ import annotations

import time

from promptd.jobs import JobProgress
from promptd.training.job import Progress


class Pace:
    """Counts the steps of one job on this worker; the time of the first one is not known."""

    def __init__(self) -> None:
        self._began = 0.0
        self._first_step = 0
        self._num_tokens = 0
        self._newest: Progress | None = None

    @property
    def newest_step(self) -> int | None:
        """The last step that was told; None before the first."""
        return None if self._newest is None else self._newest.step

    def add(self, progress: Progress) -> None:
        """Take the next step in."""
        if self._newest is None:
            self._began, self._first_step = time.monotonic(), progress.step
        else:
            self._num_tokens += progress.num_tokens
        self._newest = progress

    def told(self) -> JobProgress:
        """Return how far the job is; only after `add`."""
        if self._newest is None:
            raise RuntimeError("no step has been told yet")
        newest, seconds = self._newest, time.monotonic() - self._began
        done = newest.step - self._first_step
        return JobProgress(
            newest.step,
            newest.num_steps,
            self._num_tokens,
            newest.loss,
            None if newest.scores is None else newest.scores.loss,
            self._num_tokens / seconds if self._num_tokens else None,
            seconds / done * (newest.num_steps - newest.step) if done else None,
        )
