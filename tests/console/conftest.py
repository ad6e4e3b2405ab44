"""A real browser before a real server. Without a browser these tests are skipped, and the report says what is missing.

Screenshots go to `build/console/`, or to the folder that PROMPTD_SCREENSHOTS names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.console.browser import NoBrowserError, launched
from tests.console.visitor import Visitor
from tests.integration.server import demo_server
from tests.ports import NO_CERTIFICATES

ROOT = Path(__file__).parents[2]
ADMIN_KEY, TENANT_KEY = "the-first-admin-key", "initech-static-key"


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where pictures of the pages are kept."""
    folder = Path(os.environ.get("PROMPTD_SCREENSHOTS") or ROOT / "build" / "console")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="package")  # not longer: playwright keeps an event loop running, which no other test may find
def browser() -> Iterator[Any]:
    """One browser for all tests of this folder."""
    with contextlib.ExitStack() as stack:
        try:
            browser = stack.enter_context(launched())
        except NoBrowserError as error:
            pytest.skip(str(error))
        yield browser


@pytest.fixture(scope="package")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo as a user starts it; `browser` first, so that nothing is started only to be skipped."""
    with demo_server(tmp_path_factory.mktemp("console")) as url:
        yield url


@pytest.fixture(scope="package")
def api(url: str) -> Iterator[httpx.Client]:
    """The same server without a browser."""
    with httpx.Client(base_url=url, timeout=60, verify=NO_CERTIFICATES) as http:
        yield http


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visitor]:
    """A fresh browser window; the test fails where a page has reported an error that it did not expect."""
    visitor = Visitor(browser, url)
    yield visitor
    visitor.close()
    assert visitor.errors == []


@pytest.fixture(scope="package")
def tiny(browser: Any, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that wants keys, around a tiny model."""
    settings = Settings(
        model=str(tiny_models["llama"]),
        store=str(tmp_path_factory.mktemp("keyed")),
        admin_key=SecretStr(ADMIN_KEY),
        api_keys=SecretStr(f"initech:{TENANT_KEY}"),
        drain_seconds=1,
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live


@pytest.fixture
def keyed(browser: Any, tiny: LiveServer) -> Iterator[Visitor]:
    """A fresh window before the server that wants keys."""
    visitor = Visitor(browser, tiny.url)
    visitor.expected = ("status of 401",)  # the browser itself reports that it was asked for a key
    yield visitor
    visitor.close()
    assert visitor.errors == []
