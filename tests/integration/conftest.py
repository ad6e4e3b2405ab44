"""One server of the demo for this folder, as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.server import demo_server


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`promptd serve`: the demo and its prompts; it trains by default."""
    with demo_server(tmp_path_factory.mktemp("demo")) as url:
        yield url
