"""A run of the tests ends, whatever hangs: the last resort behind pytest-timeout.

pytest-timeout interrupts a test once. A test whose event loop then waits for a task that will not be cancelled, and a
thread that is left behind when all tests are done, would keep the run for ever. Here such a run tells where every
thread is, and ends. Tests that may take as long as they need are not watched.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

GRACE_SECONDS = 60
"""What a test has, beyond its time, to clean up; and the run, after its last test."""
_REPORT = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the terminal: pytest takes stderr away from tests."""
    config.stash[_REPORT] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch one test, with its fixtures."""
    limit = float(item.config.getoption("timeout") or item.config.getini("timeout") or 0)
    if limit and not item.get_closest_marker("long"):
        _watch(item.config, limit)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Watch on: pytest has just told `faulthandler` not to, and the test's fixtures are still to be cleaned up."""
    if not node.get_closest_marker("long"):
        _watch(node.config, 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Watch the end of the process; one of several workers waits for the others, and is ended by whoever began it."""
    if not hasattr(config, "workerinput"):
        _watch(config, 0)


def _watch(config: pytest.Config, seconds: float) -> None:
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=config.stash[_REPORT])
