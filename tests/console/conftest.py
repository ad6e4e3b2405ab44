"""A real browser before a real server. Without a browser these tests are skipped, and the report says what is missing.

Screenshots go to `build/console/`, or to the folder that PROMPTD_SCREENSHOTS names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.console.visitor import Visitor
from tests.integration.server import demo_server

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where pictures of the pages are kept."""
    folder = Path(os.environ.get("PROMPTD_SCREENSHOTS") or ROOT / "build" / "console")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")  # not longer: playwright keeps an event loop running, which no other test may find
def browser() -> Iterator[Any]:
    """The machine's own Chromium, driven by playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    names = [os.environ["PROMPTD_BROWSER"]] if "PROMPTD_BROWSER" in os.environ else BROWSERS
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed (apt-get install chromium-headless-shell)")
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = running.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo as a user starts it; `browser` first, so that nothing is started only to be skipped."""
    yield from demo_server(tmp_path_factory.mktemp("console"))


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[httpx.Client]:
    """The same server without a browser."""
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visitor]:
    """A fresh browser window; the test fails where a page has reported an error that it did not expect."""
    visitor = Visitor(browser, url)
    yield visitor
    visitor.close()
    assert visitor.errors == []
