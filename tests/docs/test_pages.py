"""Every shell and Python block of README and server/docs runs, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from promptd_client import Client

from tests.docs.compare import Shown
from tests.docs.pages import DOCS, Block, blocks_of, pages
from tests.docs.shell import Terminal
from tests.docs.stage import Reader, check_unrun, lay_out, write_adapters

QUICK = {"application.md"}
"""The pages of every run; the others start programs and train, which takes minutes."""
ADAPTERS = {"README.md": ("alice", "bob", "carol"), "peft-prompts.md": ("ann", "ben", "cleo")}
"""Pages that speak of PEFT folders which the reader has; each has names of its own on the one server."""
BLOCKS = {page: blocks_of(page) for page in pages()}
RUN = [page for page, blocks in BLOCKS.items() if any(block.not_run is None for block in blocks)]
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.not_run is not None]


def _name(page: Path) -> str:
    return str(page.relative_to(DOCS)) if page.is_relative_to(DOCS) else page.name


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")  # PEFT's own, of its own names
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=_name(page), marks=() if page.name in QUICK else pytest.mark.long) for page in RUN]
)
def test_page(page: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who follows the page from top to bottom sees what it shows."""
    lay_out(tmp_path)
    if page.name in ADAPTERS:
        write_adapters(tmp_path, *ADAPTERS[page.name])
    monkeypatch.chdir(tmp_path)
    url = f"http://{address}"
    with Client(url) as client:  # what earlier pages and examples left: each reader's server is a fresh one
        for prompt in client.prompts.list():
            if "/" not in prompt.id:
                client.prompts.delete(prompt.id)
    try:
        with Terminal(tmp_path, {"PROMPTD_URL": url}) as terminal:
            reader = Reader(address, terminal)
            for block in BLOCKS[page]:
                if block.not_run is None:
                    reader.follow(block)
    finally:
        with Client(url) as client:  # what a page started and did not wait for
            for job in client.jobs.list():
                if not job.has_ended:
                    client.jobs.cancel(job.id)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{block.place} ({block.not_run})")
def test_what_is_not_run(block: Block) -> None:
    """A block that no test runs says why, and names only commands and options that exist."""
    assert block.not_run
    check_unrun(block)


@pytest.mark.parametrize(
    ("shown", "printed", "matches"),
    [
        ("accuracy 85.3", "accuracy   85.4\n", True),
        ("accuracy 85.3", "accuracy 19.0", False),
        ("300 rows", "301 rows", False),
        (
            '{"id":"cmpl-0123456789abcdef","created":1}',
            '{"id": "cmpl-fedcba9876543210",\n "created": 1795254379}',
            True,
        ),
        ('{"id":"cmpl-0123456789abcdef"}', '{"id":"file-0123456789abcdef"}', False),
        ("ready after 3.9 s", "ready after 41 s", True),
        ("one … three … five", "one two three four five", True),
        ("one … three …", "one two three four five", True),
        ("one … three", "one two three four five", False),
        ("one …", "two one", False),
        ("one", "one two", False),
        ("", "whatever", True),
    ],
)
def test_comparison(shown: str, printed: str, matches: bool) -> None:
    """Words and counts are compared exactly, scores nearly; ids and times are not."""
    assert Shown(shown).matches(printed) is matches


def test_comparison_of_what_was_trained() -> None:
    """Where a page says that numbers vary, only they may."""
    assert Shown("accuracy 85.3 of 300", numbers_vary=True).matches("accuracy 19.0 of 20")
    assert not Shown("accuracy 85.3 of 300", numbers_vary=True).matches("loss 85.3 of 300")
