"""Runs a notebook's cells without Jupyter, and keeps what they showed: `python -m tests.docs.notebook [FILE]`.

Needs a server, as the notebook itself does: PROMPTD_URL.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "clients" / "examples" / "what_a_prompt_learns.ipynb"
DPI = 70


def run(notebook: dict[str, Any], change: Callable[[str], str] = lambda source: source) -> dict[str, Any]:
    """Run the cells in order and put their outputs into them; return the names that they leave behind.

    `change` may alter a cell's source. What is printed and what the last line stands for are outputs, as in Jupyter.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with mpl.rc_context({"backend": "agg", "figure.dpi": DPI}):
        for number, cell in enumerate(cells, 1):
            body = ast.parse(change("".join(cell["source"])), cell["id"])
            last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
            printed, result = io.StringIO(), None
            with contextlib.redirect_stdout(printed):
                exec(compile(body, cell["id"], "exec"), names)  # noqa: S102 - our own notebook
                if isinstance(last, ast.Expr):
                    result = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)  # noqa: S307
            cell["execution_count"] = number
            cell["outputs"] = [*_stream(printed.getvalue()), *_result(result, number)]
        plt.close("all")
    return names


def _stream(printed: str) -> list[dict[str, Any]]:
    return [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}] if printed else []


def _result(value: Any, number: int) -> list[dict[str, Any]]:
    if value is None:
        return []
    data: dict[str, Any] = {"text/plain": [repr(value)]}
    if isinstance(value, Figure):
        picture = io.BytesIO()
        value.savefig(picture, format="png")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), **data}
    return [{"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}}]


def main(path: Path = NOTEBOOK) -> None:
    """Run the notebook and write it with its outputs."""
    notebook = json.loads(path.read_text())
    run(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
