"""What takes most of a start is imported without garbage collections, which go on afterwards as they did before."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from promptd.modeling import heavy_imports

#: Runs a command up to its first import of torch, and tells whether garbage is collected then.
UP_TO_TORCH = """
import gc, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("collects" if gc.isenabled() else "does not collect", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
from promptd.cli import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["worker"]], ids=["serve", "worker"])
def test_commands_that_load_a_model_do_not_collect_meanwhile(command: list[str], tmp_path: Path) -> None:
    """Nothing that they import before imports torch for itself: not the store either."""
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_TORCH, *command, "--store", str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "does not collect", done.stderr


def test_collections_go_on_as_before() -> None:
    """On again where they were on, past all that is there now; off where they were off (the control: past nothing)."""
    assert gc.isenabled()
    gc.unfreeze()
    importlib.reload(heavy_imports)
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    gc.unfreeze()
    gc.disable()
    try:
        importlib.reload(heavy_imports)
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
        gc.freeze()  # as the session has it
