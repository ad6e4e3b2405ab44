"""`promptd train`: files of rows to a folder of prompts, on this machine and without a server."""

from __future__ import annotations

import gzip
import hashlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptd.commands.console import (
    AsJson,
    BaseModel,
    err,
    existing,
    fail,
    out,
    print_json,
    quiet_loading,
    read_text,
)
from promptd.commands.job_progress import Bars, job_bars, numbers_of
from promptd.commands.training_options import (
    DEFAULT_METHOD,
    Hyperparameters,
    Labels,
    Method,
    Seed,
    Template,
    label_words_of,
    method_of,
    template_of,
)

if TYPE_CHECKING:
    from promptd.jobs import JobProgress, JobSpec
    from promptd.modeling import FrozenModel
    from promptd.training import Progress
    from promptd.training.local import LocalEnd, LocalJob, LocalTraining

_COMPUTE = "Computing"


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the prompts.", metavar="DIR")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help='JSON lines, .gz too: {"prompt", "completion"}, {"text", "label"} or {"messages"}. One prompt a file. '
            "With --distill, questions alone; without ROWS the teacher writes them.",
            metavar="ROWS",
        ),
    ] = None,
    model: BaseModel = None,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="Name of the prompt. Default: the file's name.")
    ] = None,
    distill: Annotated[
        Path | None,
        typer.Option(help="Learn what the model says with this text in its context.", metavar="TEXTFILE"),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Rows to measure with. Default: a part of ROWS.", metavar="FILE")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="A prompt to start from: a file or PEFT folder.", metavar="PROMPT")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace prompts of other rows or settings in DIR.")
    ] = False,
    template: Template = None,
    label: Labels = None,
    method: Method = DEFAULT_METHOD,
    settings: Hyperparameters = None,
    seed: Seed = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", metavar="NAME", rich_help_panel=_COMPUTE)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", metavar="NAME", rich_help_panel=_COMPUTE)
    ] = "auto",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Bits depend on no other file; slower.", rich_help_panel=_COMPUTE),
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Training that a crash may lose.", metavar="S", min=0, rich_help_panel=_COMPUTE)
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Train prompts here, as the server would: the same methods, measured beside the bare model on held-out rows.

    Several files are trained at once and share passes. Ctrl-C saves them; the same command again goes on, and leaves
    finished prompts alone. DIR gets NAME.safetensors, its parameters before folding, and NAME.json with all scores.

    [dim]promptd train rows.jsonl -o prompts/[/]  (then: promptd prompts push prompts/)
    [dim]promptd train --distill manual.txt -o prompts/[/]
    [dim]promptd train alice.jsonl bob.jsonl -o prompts/ --model ./Qwen2-0.5B -s num_steps=500[/]
    """
    try:
        from promptd_store import StoreError

        from promptd.errors import PromptdError
        from promptd.jobs import JobSpec
    except ImportError as error:
        fail(f"{error.name or error} is missing", hint="pip install 'promptd[server]'")

    if not files and distill is None:
        fail("there is nothing to learn from", hint="Give files of rows, or --distill TEXTFILE.")
    wanted = {} if seed is None else {"seed": seed}
    spec = JobSpec(method_of(method, settings), None, wanted, template=template_of(template),
                   label_words=label_words_of(label),
                   distill=None if distill is None else {"text": read_text(distill)})  # fmt: skip
    try:
        jobs = _jobs(files or [], name or (distill.stem if distill and not files else None), spec, validation)
        base = _loaded(model, device, dtype, strict=strict)
        ends = _run(
            base, jobs, output, start, overwrite=overwrite, strict=strict, checkpoint_seconds=checkpoint_seconds
        )
    except (PromptdError, StoreError) as error:
        fail(error.message)
    except OSError as error:
        fail(str(error))
    if as_json:
        for end in ends:
            print_json(_to_json(end))
    else:
        _print_ends(ends, output)
    if any(end.state == "stopped" for end in ends):
        err().print("[dim]saved where it was; the same command goes on from there[/]")
        raise typer.Exit(130)
    if any(end.state == "failed" for end in ends):
        raise typer.Exit(1)


def _jobs(files: Sequence[Path], name: str | None, spec: JobSpec, validation: Path | None) -> list[LocalJob]:
    """Read the files; whatever needs no model is checked here."""
    from dataclasses import replace

    from promptd_store import check_name

    from promptd.jobs import JobData
    from promptd.training.job_spec import check_spec
    from promptd.training.local import LocalJob

    check_spec(spec)
    if name is not None and len(files) > 1:
        fail(f"--name names one prompt, but there are {len(files)} files")
    held_out = None if validation is None else _read(validation)
    jobs: dict[str, LocalJob] = {}
    if not files:  # the teacher writes the rows
        return [LocalJob(check_name(name or ""), replace(spec, name=name), JobData(b"", held_out))]
    for path in files:
        own = check_name(name or path.name.removesuffix(".gz").removesuffix(".jsonl"))
        if own in jobs:
            fail(f"two files are named {own}", hint="Each file makes a prompt of its own; rename one of them.")
        rows = _read(path)
        digest = f"sha256:{hashlib.sha256(rows).hexdigest()}"
        jobs[own] = LocalJob(own, replace(spec, name=own, rows_digest=digest), JobData(rows, held_out))
    return list(jobs.values())


def _read(path: Path) -> bytes:
    content = existing(path).read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        fail(f"{path}: {error}")


def _loaded(path: str | None, device: str, dtype: str, *, strict: bool) -> FrozenModel:
    from promptd.demo import DEMO_MODEL_PATH
    from promptd.modeling import load_model
    from promptd.processors import use_threads

    err().print(f"[bold]promptd train[/] loading {path or 'the embedded demo model'} …")
    quiet_loading()
    use_threads(None)
    return load_model(path or DEMO_MODEL_PATH, device=device, dtype=dtype, strict=strict)


def _run(
    model: FrozenModel, jobs: Sequence[LocalJob], output: Path, start: Path | None, *, overwrite: bool, **options: Any
) -> list[LocalEnd]:
    """Run the jobs to their ends or to a signal."""
    from dataclasses import replace

    from promptd_store import read_prompt

    from promptd.training.folder import PromptFolder
    from promptd.training.local import LocalTraining

    if start is not None:
        artifact = read_prompt(existing(start), model.spec)
        jobs = [replace(job, start=artifact) for job in jobs]
    folder, ends = PromptFolder(output), list["LocalEnd"]()
    with folder.locked(), job_bars([job.name for job in jobs], "waiting") as bars:

        def started(name: str, step: int) -> None:
            bars.tell(name, "training")
            if step:
                bars.say(f"{name}: goes on after step {step}")

        def progressed(name: str, told: JobProgress, progress: Progress) -> None:
            bars.move(name, told)
            if progress.scores is not None:
                bars.say(f"{name}: step {told.step} of {told.num_steps}  {_scored(progress)}{numbers_of(told)}")

        def ended(end: LocalEnd) -> None:
            ends.append(end)
            bars.end(end.name)

        training = LocalTraining(
            model, folder, overwrite=overwrite, on_start=started, on_progress=progressed, on_end=ended, **options
        )
        with _stopped_by_signals(training, bars):
            training.run(jobs)
    order = [job.name for job in jobs]
    return sorted(ends, key=lambda end: order.index(end.name))


@contextmanager
def _stopped_by_signals(training: LocalTraining, bars: Bars) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM save everything; the second one ends the process."""

    def on_signal(number: int, frame: object) -> None:
        training.stop()
        for one, handler in before.items():
            signal.signal(one, handler)
        bars.say("saving after this step; once more ends at once")

    before = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _scored(progress: Progress) -> str:
    accuracy = None if progress.scores is None else progress.scores.accuracy
    return "" if accuracy is None else f"accuracy {accuracy:.1%}  "


def _to_json(end: LocalEnd) -> dict[str, Any]:
    from dataclasses import asdict

    error = None if end.error is None else asdict(end.error)
    return {"name": end.name, "state": end.state, "error": error, **(end.card or {})}


def _print_ends(ends: Sequence[LocalEnd], output: Path) -> None:
    """One line a prompt: scores on held-out rows before and after; why not, where there is none."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    done = [end for end in ends if end.card is not None]
    if done:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("prompt", no_wrap=True)
        for column in ("held out", "bare model", "majority", "with it", "best step", "time"):
            table.add_column(column, justify="right")
        for end in done:
            table.add_row(escape(end.name), *_cells(end.card or {}))
        out().print(table)
    for end in ends:
        if end.error is not None:
            err().print(f"[bold red]FAIL[/]  {escape(end.name)}  {escape(end.error.message)}")
            if end.error.code == "prompt_exists":
                err().print("[dim]--overwrite replaces it; another name or folder keeps both[/]")
        elif end.state == "unchanged":
            err().print(f"[dim]same[/]  {escape(end.name)}  was there already, of these rows and settings")
    if done:
        err().print(f"[dim]promptd prompts push {escape(str(output))}[/]")


def _cells(card: dict[str, Any]) -> list[str]:
    facts = card["provenance"]
    before, after = facts["scores"]["before"], facts["scores"]["after"]
    if after["accuracy"] is None:
        colour = "green" if after["loss"] < before["loss"] else "red"
        scores = [f"loss {before['loss']:.3f}", "", f"[{colour}]loss {after['loss']:.3f}[/]"]
    else:
        colour = "green" if after["accuracy"] > before["accuracy"] else "red"
        majority = facts["majority"]
        scores = [
            f"{before['accuracy']:.1%}",
            "" if majority is None else f"{majority['share']:.1%}",
            f"[{colour}]{after['accuracy']:.1%}[/]",
        ]
    steps = f"{facts['best_step']}/{facts['hyperparameters']['num_steps']}"
    return [f"{after['num_rows']} rows", *scores, steps, f"{facts['seconds']:.0f} s"]
