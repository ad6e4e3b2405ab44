"""Work that shares the engine's thread: it runs when no request needs the model, and gives way between its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class SpareTime(Protocol):
    """What the engine's thread does besides answering."""

    wake: Callable[[], None]
    """Set by the engine: to be called, from any thread, when there is work."""

    @property
    def has_work(self) -> bool:
        """Whether `run` has anything to do."""
        ...

    def run(self, serve: Callable[[], None]) -> None:
        """Do a bounded piece of the work; call `serve` every few milliseconds, it answers the requests in between."""
        ...


class Turns:
    """Who is next while requests run: a slice of spare time has to be paid for by steps of the engine.

    Every step earns `seconds_per_step`. A slice is granted when its predecessor's duration has been earned, so that on
    average spare time makes a step that much longer and no more.
    """

    def __init__(self, seconds_per_step: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_per_step = seconds_per_step
        self._clock = clock
        self._earned = 0.0
        self._slice_began = clock()

    def begin_slice(self) -> None:
        """Spare time runs from now on."""
        self._slice_began = self._clock()

    def end_slice(self) -> None:
        """Spare time has given way; what it took is to be earned."""
        self._earned -= self._clock() - self._slice_began

    def stepped(self) -> bool:
        """Count a step; return whether the next slice is due."""
        self._earned += self._seconds_per_step
        return self._earned >= 0

    def idle(self) -> None:
        """No request runs: what spare time takes now costs nobody."""
        self._earned = 0.0
