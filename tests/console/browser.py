"""This machine's Chromium, driven by playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class NoBrowserError(Exception):
    """Something that is needed is not installed; the message says what."""


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """Yield a running browser. Playwright keeps an event loop running meanwhile, which no other code may find."""
    try:
        from playwright import sync_api
    except ModuleNotFoundError:
        raise NoBrowserError("playwright is not installed (pip install playwright)") from None
    names = [os.environ["PROMPTD_BROWSER"]] if "PROMPTD_BROWSER" in os.environ else BROWSERS
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise NoBrowserError(
            f"no browser: none of {', '.join(names)} is installed (apt-get install chromium-headless-shell)"
        )
    with sync_api.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()
