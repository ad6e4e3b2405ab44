"""Options that say how a prompt is trained, on a server or here, and what they come to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from promptd.commands.console import fail

METHOD_NAMES = ("residual", "prompt_tuning", "prefix_tuning", "p_tuning_v2", "low_rank", "ulpt", "superpos")
DEFAULT_METHOD = METHOD_NAMES[0]
_TASK, _METHOD = "Task", "Method"

Template = Annotated[
    str | None,
    typer.Option(
        help=r"How a row becomes text: 'Review: {text}\nMood:'. It is stored with the prompt.",
        metavar="TEXT",
        rich_help_panel=_TASK,
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        help="A label and the word that stands for it; repeatable. Default: the labels themselves.",
        metavar="LABEL=WORD",
        rich_help_panel=_TASK,
    ),
]
Method = Annotated[
    str,
    typer.Option(help=f"{', '.join(METHOD_NAMES)}.", metavar="NAME", show_default=True, rich_help_panel=_METHOD),
]
Hyperparameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="A hyper-parameter, of the method or num_steps, batch_size, schedule, patience, …; repeatable.",
        metavar="NAME=VALUE",
        rich_help_panel=_METHOD,
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of everything random (0).", metavar="N", min=0, rich_help_panel=_METHOD)
]


def method_of(name: str, hyperparameters: Sequence[str] | None) -> dict[str, Any]:
    """Return a job's method, as on the wire."""
    values = {key: _json_or_text(value) for key, value in _pairs("--set", hyperparameters)}
    return {"type": name, name: {"hyperparameters": values}}


def template_of(text: str | None) -> str | None:
    r"""Return the template; `\n` and `\t`, which shells do not read, are a new line and a tab."""
    return None if text is None else text.replace(r"\n", "\n").replace(r"\t", "\t")


def label_words_of(labels: Sequence[str] | None) -> dict[str, str] | None:
    """Return label -> word."""
    return dict(_pairs("--label", labels)) or None


def _pairs(option: str, values: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    for value in values or []:
        name, separator, rest = value.partition("=")
        if not separator or not name or not rest:
            fail(f"{option} takes NAME=VALUE, got {value!r}")
        if name in pairs:
            fail(f"{option} {name} is given twice")
        pairs[name] = rest
    return list(pairs.items())


def _json_or_text(value: str) -> Any:
    """Read 3, 0.1, true and null as what they are in JSON; anything else is text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
