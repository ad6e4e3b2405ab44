"""`promptd prompts push`: many prompts to a server, one report line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    BaseModel,
    Url,
    connected,
    fail,
    print_json,
    quiet_loading,
)

if TYPE_CHECKING:
    from promptd_client import Client
    from promptd_store import BaseModelSpec

    from promptd.commands.push_state import PushState
    from promptd.commands.sources import Source

_MARKS = {"failed": "[bold red]FAIL[/]", "unchanged": "[dim]same[/]", "skipped": "[dim]skip[/]"}


@dataclass(frozen=True, slots=True)
class Report:
    """One line: what became of one prompt."""

    name: str
    path: str
    status: str
    """pushed, unchanged, skipped (an earlier run pushed it), checked (dry run) or failed."""
    kind: str | None = None
    num_virtual_tokens: int | None = None
    num_bytes: int | None = None
    version: str | None = None
    number: int | None = None
    error: str | None = None


def push(
    folders: Annotated[
        list[Path], typer.Argument(help="PEFT folders, folders full of them, or .safetensors files.", metavar="DIR")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the prompt. Default: the folder's name.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check only, without a server; with --model, every check of an upload.")
    ] = False,
    model: BaseModel = None,
    jobs: Annotated[int, typer.Option(help="Uploads at once.", min=1, max=64)] = 4,
    state: Annotated[Path | None, typer.Option(help="Where to note what is done.", metavar="FILE")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Skip what an earlier run has pushed and is unchanged.")
    ] = True,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload PEFT folders, hundreds at once if you like.

    One line for each prompt says what became of it. Run the same command again after an interruption: what the
    server already has is skipped. The status is 1 if any prompt failed.

    [dim]promptd prompts push adapters/ --dry-run --model ./my-model[/]
    [dim]promptd prompts push adapters/ --jobs 8[/]
    """
    from promptd_client import LocalFileError

    from promptd.commands.sources import find_sources

    if model is not None and not dry_run:
        fail("--model goes with --dry-run: without it, the server checks against its own model")
    try:
        sources = find_sources(folders, name)
    except LocalFileError as error:
        fail(str(error))
    started = time.monotonic()
    with _reporting(sources, as_json=as_json) as report:
        unique = list(_unique(sources, report))
        if dry_run:
            _check(unique, model, report)
        else:
            with connected(url, api_key) as client:
                from promptd.commands.push_state import PushState, default_state_file

                earlier = PushState(state or default_state_file(), client.base_url, reads_earlier=resume)
                _push(unique, client, earlier, jobs, report)
        reports = report.lines
    if not as_json:
        _summarize(reports, time.monotonic() - started)
    if any(one.status == "failed" for one in reports):
        raise typer.Exit(1)


class _Reporter:
    """Collects the lines and prints each as it comes."""

    def __init__(self, show: Callable[[Report], None]) -> None:
        self._show = show
        self.lines: list[Report] = []

    def __call__(self, line: Report) -> None:
        self.lines.append(line)
        self._show(line)


@contextmanager
def _reporting(sources: Sequence[Source], *, as_json: bool) -> Iterator[_Reporter]:
    """Print lines above a progress bar on a terminal, or plain lines, or JSON."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from promptd.commands.console import err, out

    if as_json:
        yield _Reporter(lambda line: print_json(asdict(line)))
        return
    width = max(len(source.name) for source in sources)
    console = out()
    columns = (TextColumn("[dim]prompts[/]"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # One console for both: the bar has to step aside for each line. Without a terminal there is no bar.
    with Progress(*columns, console=console, transient=True, disable=not err().is_terminal) as progress:
        task = progress.add_task("", total=len(sources))

        def show(line: Report) -> None:
            console.print(_line(line, width), soft_wrap=True)
            progress.advance(task)

        yield _Reporter(show)


def _line(report: Report, width: int) -> str:
    from rich.markup import escape

    from promptd.commands.console import human_bytes

    mark = _MARKS.get(report.status, "[green] ok [/]")
    start = f"{mark}  {escape(report.name):<{width}}"
    if report.error is not None:
        return f"{start}  {escape(report.error)}"
    tokens = f"{report.num_virtual_tokens:>5} tokens" if report.num_virtual_tokens is not None else " " * 12
    size = f"{human_bytes(report.num_bytes):>9}" if report.num_bytes is not None else " " * 9
    version = f"  v{report.number}" if report.number is not None else ""
    return f"{start}  {report.kind or '':<6} {tokens} {size}  {report.status}{version}"


def _unique(sources: Sequence[Source], report: _Reporter) -> Iterator[Source]:
    """Yield sources whose names differ; two folders of one name would silently become two versions."""
    seen: dict[str, Path] = {}
    for source in sources:
        if source.name in seen:
            message = f"duplicate_name: {seen[source.name]} has this name too; push it on its own with --name"
            report(Report(source.name, str(source.path), "failed", error=message))
        else:
            seen[source.name] = source.path
            yield source


def _check(sources: Sequence[Source], model: str | None, report: _Reporter) -> None:
    from promptd.commands.local_check import check_source

    spec = None if model is None else _spec(model)
    for source in sources:
        found = check_source(source, spec)
        status = "failed" if found.error else "checked"
        report(Report(source.name, str(source.path), status, **asdict(found)))


def _spec(model: str) -> BaseModelSpec:
    from promptd.errors import ModelRefusedError
    from promptd.modeling import load_model

    quiet_loading()
    try:
        return load_model(model, device="cpu", packed_linears=False).spec
    except ModelRefusedError as error:
        fail(str(error))


def _push(sources: Sequence[Source], client: Client, state: PushState, jobs: int, report: _Reporter) -> None:
    current = {prompt.name: prompt.version for prompt in client.prompts.list()}
    with ThreadPoolExecutor(jobs) as pool:
        pushes: dict[Future[tuple[Report, str | None]], Source] = {
            pool.submit(_push_one, source, client, state, current): source for source in sources
        }
        try:
            for push in as_completed(pushes):
                line, digest = push.result()
                if line.status in ("pushed", "unchanged") and digest and line.version:
                    state.add(line.name, digest, line.version)
                report(line)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            fail("interrupted", hint="Run the same command again to go on.")


def _push_one(source: Source, client: Client, state: PushState, current: dict[str, str]) -> tuple[Report, str | None]:
    """Send one prompt; return its line and the digest of what was sent."""
    from promptd_client import PromptdError

    from promptd.commands.console import describe
    from promptd.commands.sources import digest_of

    path = str(source.path)
    try:
        content = source.read()
        digest = digest_of(content)
        if state.is_done(source.name, digest, current):
            return Report(source.name, path, "skipped", version=current[source.name]), digest
        if isinstance(content, bytes):
            prompt = client.prompts.upload(source.name, content)
        else:
            prompt = client.prompts.upload_peft(source.name, content)
    except PromptdError as error:
        return Report(source.name, path, "failed", error=describe(error)), None
    status = "unchanged" if current.get(source.name) == prompt.version else "pushed"
    line = Report(
        source.name,
        path,
        status,
        prompt.kind,
        prompt.num_virtual_tokens,
        prompt.num_bytes,
        prompt.version,
        prompt.number,
    )
    return line, digest


def _summarize(reports: Sequence[Report], seconds: float) -> None:
    from promptd.commands.console import err

    counts: dict[str, int] = {}
    for one in reports:
        counts[one.status] = counts.get(one.status, 0) + 1
    words = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    err().print(f"[bold]{words}[/] in {seconds:.1f} s")
