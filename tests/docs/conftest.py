"""The server of the demo for all pages and examples."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def address(demo_url: str) -> str:
    """Host and port of the server of the demo."""
    return demo_url.removeprefix("http://")
