"""`promptd prompts verify`: the answers of PEFT and of promptd side by side, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptd.commands.console import AsJson, existing, fail, out, print_json, quiet_loading


def verify(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder.", metavar="DIR")],
    inputs: Annotated[
        Path,
        typer.Option(help='JSON lines: a text each, or an object with "prompt", "input" or "text".', metavar="FILE"),
    ],
    model: Annotated[str, typer.Option(help="Base model: a folder or a hub id.", metavar="PATH_OR_ID")],
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="Only the first N inputs.", metavar="N", min=1)] = None,
    served: Annotated[
        Path | None,
        typer.Option(help="What promptd runs, such as a file pulled from a server. Default: DIR.", metavar="PATH"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many greedy answers are token for token those of PEFT.

    PEFT runs one request at a time (its batches are wrong under left padding), promptd runs all in one mixed batch.
    An answer that first differs where PEFT's two best logits are equal within rounding counts as a tie. The status
    is 1 if any answer differs otherwise.

    [dim]promptd prompts verify adapters/alice --inputs questions.jsonl --model ./my-model[/]
    """
    try:
        from promptd_store import StoreError

        from promptd.commands.peft_oracle import InputError, compare, read_inputs
        from promptd.errors import PromptdError
    except ImportError as error:
        fail(f"{error.name or error} is missing", hint="pip install 'promptd[server,verify]'")

    existing(folder)
    quiet_loading()
    try:
        texts = read_inputs(existing(inputs))[:limit]
        results = compare(folder, texts, model, max_tokens, served)
    except (InputError, PromptdError, StoreError) as error:
        fail(str(error))
    identical = sum(result.is_identical for result in results)
    ties = sum(result.is_tie for result in results)
    different = len(results) - identical - ties
    if as_json:
        for result in results:
            print_json(result.to_dict())
    else:
        for number, result in enumerate(results, 1):
            if not result.is_identical:
                out().print(result.explain(number), markup=False, soft_wrap=True)
        colour = "green" if not different else "red"
        out().print(
            f"[bold {colour}]{identical} of {len(results)} answers are token-identical to PEFT[/]"
            f", {ties} ties, {different} different",
            soft_wrap=True,
        )
    if different:
        raise typer.Exit(1)
