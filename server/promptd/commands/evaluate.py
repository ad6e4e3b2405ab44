"""`promptd eval`: how good are prompts on rows with known answers, beside the bare model and the majority class?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import (
    ApiKey,
    AsJson,
    BaseModel,
    describe,
    err,
    existing,
    fail,
    out,
    print_json,
    quiet_loading,
)
from promptd.json_line import json_line

if TYPE_CHECKING:
    from promptd.evaluation import AnswerBy, EvaluationResult, Task
    from promptd.training import Example

TASK_NAMES = (
    "boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc", "sst2", "trec", "ag_news", "e2e",
    "shakespeare", "author_style",
)  # fmt: skip
_ROWS = "Rows"
_HOW = "How"


def evaluate(
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt file or PEFT folder, or a name; repeatable.", metavar="PROMPT"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines with "label" or "completion"; with --task, its data set or the folder of all.',
            metavar="PATH",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"Read published rows: {', '.join(TASK_NAMES)}.", metavar="NAME", rich_help_panel=_ROWS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="A sample of N rows, the same every time.", min=1, metavar="N", rich_help_panel=_ROWS),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only rows like this, such as user=alice.", metavar="FIELD=VALUE", rich_help_panel=_ROWS),
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Let all prompts vote, too.", rich_help_panel=_HOW)
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="Generate labels in place of scoring them.", rich_help_panel=_HOW)
    ] = False,
    beams: Annotated[
        int,
        typer.Option(help="Beams of what is generated; 1 is greedy.", min=1, metavar="N", rich_help_panel=_HOW),
    ] = 1,
    model: BaseModel = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="A running server. Without it, the model runs here.", rich_help_panel="Server"),
    ] = None,
    api_key: ApiKey = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every single answer to this file, as JSON lines.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prompts on rows with known answers, beside the bare model and the majority class.

    Labels are scored by their words, texts are generated greedily, and all prompts share the batches. A prompt is
    asked with its own template and label words where it has them, else with the task's.

    [dim]promptd eval -p snips-intent[/]  (the demo, on rows it has not seen)
    [dim]promptd eval -p a.safetensors -p b.safetensors --ensemble --data rows.jsonl[/]
    [dim]promptd eval -p alice --task boolq --data superglue/ --url http://gpu:8000[/]
    """
    try:
        from promptd_client import ConnectionFailedError
        from promptd_client import PromptdError as ServerError
        from promptd_store import StoreError

        from promptd.errors import PromptdError
    except ImportError as error:
        fail(f"{error.name or error} is missing", hint="pip install 'promptd[server]'")

    names = prompts or []
    try:
        chosen, examples = _rows(task, data or _held_out(names), dict(map(_pair, where or [])), limit)
        with _progress() as on_progress:
            results = asyncio.run(
                _run(chosen, examples, names, model, url, api_key, ensemble, "generate" if generate else "score",
                     num_beams=beams, keep_predictions=predictions is not None, on_progress=on_progress)
            )  # fmt: skip
    except ConnectionFailedError as error:
        fail(str(error), hint=f"Is a server running at {url}? Start one with: promptd serve")
    except ServerError as error:
        fail(describe(error))
    except (PromptdError, StoreError, OSError) as error:
        fail(str(error))
    if predictions is not None:
        _write_predictions(predictions, results)
    if as_json:
        for result in results:
            print_json(replace(result, predictions=None).to_dict())
    else:
        _print_table(results)


async def _run(
    task: Task,
    examples: Sequence[Example],
    names: Sequence[str],
    model: str | None,
    url: str | None,
    api_key: str | None,
    ensemble: bool,
    answer_by: AnswerBy,
    *,
    num_beams: int,
    keep_predictions: bool,
    on_progress: Callable[[int, int], None],
) -> list[EvaluationResult]:
    """Ask a server where there is one, else a model in this process; the bare model is always among the subjects."""
    import functools

    from promptd.evaluation import ClientBackend, LLMBackend
    from promptd.evaluation import evaluate as run

    measure = functools.partial(
        run, task=task, examples=examples, prompts=[None, *names], ensemble=ensemble, answer_by=answer_by,
        num_beams=num_beams, keep_predictions=keep_predictions, on_progress=on_progress,
    )  # fmt: skip
    if url is not None:
        from promptd_client import AsyncClient

        async with AsyncClient(url, api_key=api_key) as client:
            return await measure(ClientBackend(client))
    from promptd import LLM
    from promptd.demo import DEMO_MODEL_PATH

    quiet_loading()
    return await measure(LLMBackend(LLM(model or DEMO_MODEL_PATH), find=_find))


def _rows(name: str | None, path: Path, where: dict[str, str], limit: int | None) -> tuple[Task, list[Example]]:
    """Read the rows; rows of our own make their own task."""
    from promptd.evaluation import TASKS, read_rows, task_of

    if name is not None and name not in TASKS:
        fail(f"there is no task {name!r}", hint=f"There are {', '.join(TASKS)}.")
    task = None if name is None else TASKS[name]
    examples = read_rows(existing(path), task, where=where, limit=limit)
    return task or task_of(examples, path.stem), examples


def _held_out(names: Sequence[str]) -> Path:
    """Return the rows that were shipped with the first prompt that has some."""
    from promptd.demo import DEMO_DATA_PATH

    shipped = [DEMO_DATA_PATH / f"{Path(name).stem}.jsonl" for name in names]
    path = next((path for path in shipped if path.exists()), None)
    if path is None:
        fail("no rows to evaluate on: name a file with --data", hint="Or try the demo: promptd eval -p snips-intent")
    return path


def _find(name: str) -> Path:
    """Return the file or folder of a prompt; a bare name is one of the demo's."""
    from promptd.demo import DEMO_PROMPTS_PATH

    shipped = DEMO_PROMPTS_PATH / f"{name}.safetensors"
    return shipped if not Path(name).exists() and shipped.exists() else existing(Path(name))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        fail(f"--where takes FIELD=VALUE, got {text!r}")
    return name, value


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on the terminal; yields what moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        row = bar.add_task("evaluating", total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _print_table(results: Sequence[EvaluationResult]) -> None:
    """One line a subject, best scores bold, everything in percent; what shaped the text below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from promptd.evaluation import BARE_MODEL, PERCENT_METRICS

    first = results[0]
    rows = f"{first.num_rows} rows" + (f", {first.num_inputs} inputs" if first.num_inputs != first.num_rows else "")
    way = "greedily" if first.num_beams == 1 else f"with {first.num_beams} beams"
    answered = "labels scored" if first.answer_by == "score" else f"generated {way}"
    out().print(
        f"\n[bold]{escape(first.task)}[/]  [dim]{rows}, {answered}, {first.seconds:.1f} s, scores in percent[/]",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for metric in first.metrics:
        table.add_column(metric, justify="right")
    best = {metric: max(result.metrics[metric] for result in results) for metric in first.metrics}
    bare = next((result for result in results if result.subject == BARE_MODEL), None)
    if bare is not None:
        table.add_column("against bare", justify="right")
    lead = next(iter(first.metrics))
    for result in results:
        cells = []
        for metric, value in result.metrics.items():
            text = f"{value if metric in PERCENT_METRICS else 100 * value:.1f}"
            cells.append(f"[bold]{text}[/]" if value == best[metric] else text)
        if bare is not None:
            gain = (result.metrics[lead] - bare.metrics[lead]) * (1 if lead in PERCENT_METRICS else 100)
            colour = "green" if gain > 0 else "red"
            cells.append(f"[{colour}]{gain:+.1f}[/]" if result.prompt_versions else "")
        table.add_row(escape(Path(result.subject).name if result.prompt_versions else result.subject), *cells)
    out().print(table)
    for result in results:
        if result.num_too_long:
            out().print(
                f"[yellow]{escape(Path(result.subject).name)}: {result.num_too_long} inputs exceed the model's length "
                "and count as wrong[/]", soft_wrap=True,
            )  # fmt: skip
    for template in dict.fromkeys(result.template for result in results):
        out().print(f"[dim]template[/] {escape(template or '{text}')!r}", soft_wrap=True)
    for words in dict.fromkeys(tuple((result.label_words or {}).values()) for result in results):
        if words:
            out().print(f"[dim]label words[/] {escape(', '.join(map(repr, words)))}", soft_wrap=True)


def _write_predictions(path: Path, results: Sequence[EvaluationResult]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            for row in result.predictions or ():
                line = {"subject": result.subject, "line": row.line, "prediction": row.prediction,
                        "expected": list(row.expected)}  # fmt: skip
                file.write(json_line(line) + "\n")
