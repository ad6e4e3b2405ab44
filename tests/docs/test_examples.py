"""The examples of clients/examples run as their one command says, in small."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.notebook import NOTEBOOK
from tests.docs.notebook import run as run_cells
from tests.docs.pages import ROOT

EXAMPLES = ROOT / "clients" / "examples"


def run(name: str, address: str, folder: Path, *options: str) -> str:
    """Run an example as a user does; return what it printed."""
    environment = {**os.environ, "PROMPTD_URL": f"http://{address}", "MPLBACKEND": "agg", "COLUMNS": "160"}
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_many_tasks(address: str, tmp_path: Path) -> None:
    """Everybody gets the answer of the task that they asked."""
    printed = run("many_tasks.py", address, tmp_path)
    for answer in ("PlayMusic", "GetWeather", "transfer", "Cotto", "10 people, 7 tasks"):
        assert answer in printed, printed


def test_per_user_style(address: str, tmp_path: Path) -> None:
    """Two styles are written, and each user's held-out verses fit the own prompt best."""
    printed = run("per_user_style.py", address, tmp_path)
    rows = re.findall(r"(Alice|Bob)'s +│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+)", printed)
    losses = {user: [float(loss) for loss in losses] for user, *losses in rows}
    bare, own, other = losses["Alice"]
    assert own < min(bare, other), printed
    bare, other, own = losses["Bob"]
    assert own < min(bare, other), printed


@pytest.mark.long
def test_nightly_personalization(address: str, tmp_path: Path) -> None:
    """Every user has a prompt after the first night, and a second version after the next one."""
    options = ("--users", "3", "--rows", "12", "--steps", "4")
    assert "3 prompts in" in run("nightly_personalization.py", address, tmp_path, *options)
    page = (tmp_path / "nightly" / "report.html").read_text()
    assert page.count("<tr><td>user-") == 3 and "data:image/png;base64," in page
    assert "3 prompts in" in run("nightly_personalization.py", address, tmp_path, *options)


def pictures(notebook: dict[str, Any]) -> int:
    """How many cells show one."""
    return sum(
        "image/png" in output.get("data", ()) for cell in notebook["cells"] for output in cell.get("outputs", ())
    )


def test_the_notebook_is_shown_as_it_ran() -> None:
    """Every cell has what it printed or drew, in one run from top to bottom, so that it reads without a server."""
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell["id"] for cell in cells if not cell["outputs"]] == [cells[-1]["id"]], "the last one says good-bye"
    assert pictures(notebook) == 2


@pytest.mark.long
def test_notebook(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of the notebook runs, and its curves are those of three jobs."""
    monkeypatch.setenv("PROMPTD_URL", f"http://{address}")
    monkeypatch.chdir(ROOT)
    notebook = json.loads(NOTEBOOK.read_text())

    def shorten(source: str) -> str:
        return source.replace("NUM_STEPS = 60", "NUM_STEPS = 10").replace("axes.legend(", "legend = axes.legend(")

    names = run_cells(notebook, shorten)
    assert len(names["legend"].get_texts()) == 3 and pictures(notebook) == 2
    assert {job.status for job in names["jobs"].values()} == {"succeeded"}
