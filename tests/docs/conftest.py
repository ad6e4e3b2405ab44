"""One server of the demo for all pages and examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.server import demo_server


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of one server of the demo, as `promptd serve` starts it."""
    with demo_server(tmp_path_factory.mktemp("docs")) as url:
        yield url.removeprefix("http://")
