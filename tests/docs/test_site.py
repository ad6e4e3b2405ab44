"""The API reference is current, every link leads somewhere, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.api_reference import PAGE, write
from tests.docs.pages import DOCS, ROOT, pages

_LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#)([^)#\s]+)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_the_api_reference_is_current() -> None:
    """The page is what the OpenAPI document says now."""
    assert PAGE.read_text() == write(), "run: python -m tests.docs.api_reference"


def _anchors(page: Path) -> set[str]:
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(page.read_text()))
    return {heading.replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Every link inside the repository names a file that exists, and a heading of it."""
    for target, anchor in _LINK.findall(page.read_text()):
        linked = (page.parent / target).resolve()
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(linked), f"{page.name}: {target}#{anchor}"


def test_every_page_begins_with_its_title() -> None:
    """Nothing stands in front of it."""
    assert [page.name for page in pages() if not page.read_text().startswith("# ")] == []


def test_every_page_is_in_the_index() -> None:
    """Whoever starts at server/docs/README.md can reach every page."""
    seen, todo = set[Path](), [DOCS / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        linked = {(page.parent / target).resolve() for target, _ in _LINK.findall(page.read_text())}
        todo += [each for each in linked - seen if each.suffix == ".md" and each.is_relative_to(DOCS)]
    assert seen == set(DOCS.rglob("*.md"))


@pytest.mark.skipif(not importlib.util.find_spec("material"), reason="mkdocs-material (the extra `docs`) is missing")
def test_the_site_builds(tmp_path: Path) -> None:
    """mkdocs builds every page, and has nothing to warn of."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "server" / "mkdocs.yml")]
    built = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True, check=False, timeout=240)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "quickstart" / "application" / "index.html").is_file()
