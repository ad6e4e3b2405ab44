"""`promptd jobs create | ls | show | watch | cancel | pause | resume | rm`: training on a server, from the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptd.commands.console import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    Url,
    connected,
    err,
    existing,
    fail,
    out,
    print_json,
    read_text,
)
from promptd.commands.job_tables import print_details, print_job, print_table
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
    from promptd_client import Client

JobId = Annotated[str, typer.Argument(help="Id of a job, ftjob-…", metavar="JOB")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train prompts on a server: start, watch, pause and cancel jobs. Without a server: promptd train.",
    epilog="[dim]The server's address and key can be set once: PROMPTD_URL and PROMPTD_API_KEY.[/]",
)


@app.command(rich_help_panel="Train")
def create(
    file: Annotated[
        Path | None,
        typer.Argument(
            help='JSON lines: {"prompt", "completion"}, {"text", "label"} or {"messages"}. With --distill, questions '
            "alone; without FILE the teacher writes them."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of the prompt. Default: ft-<job id>.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, or a prompt to start from. Default: the server's base model.")
    ] = None,
    behind: Annotated[
        list[str] | None, typer.Option(help="A prompt to train behind; several are a chain.", metavar="NAME")
    ] = None,
    distill: Annotated[
        Path | None,
        typer.Option(help="Learn what the model says with this text in its context.", metavar="TEXTFILE"),
    ] = None,
    distill_prompt: Annotated[
        str | None, typer.Option(help="The same with a stored prompt, a text say, in its context.", metavar="NAME")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Rows to measure with. Default: a part of FILE.", metavar="FILE")
    ] = None,
    template: Template = None,
    label: Labels = None,
    method: Method = DEFAULT_METHOD,
    settings: Hyperparameters = None,
    seed: Seed = None,
    publish_worse: Annotated[
        bool, typer.Option("--publish-worse", help="Publish also what scores below the prompt it replaces.")
    ] = False,
    follow: Annotated[bool, typer.Option("--watch", "-w", help="Watch the job until it ends.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload rows and train a prompt on them.

    [dim]promptd jobs create rows.jsonl --name tone --watch[/]
    [dim]promptd jobs create rows.jsonl -s num_steps=500 -s num_virtual_tokens=20[/]
    [dim]promptd jobs create --distill system_prompt.txt --name concierge --watch[/]
    """
    taught = {"text": None if distill is None else read_text(distill), "prompt": distill_prompt}
    taught = {name: value for name, value in taught.items() if value is not None}
    if file is None and not taught:
        fail("there is nothing to learn from", hint="give a FILE of rows, --distill or --distill-prompt")
    options: dict[str, Any] = {
        "suffix": name,
        "model": model,
        "behind": behind or None,
        "distill": taught or None,
        "template": template_of(template),
        "label_words": label_words_of(label),
        "method": method_of(method, settings),
        "seed": seed,
        "publish_worse": publish_worse or None,
    }
    with connected(url, api_key) as client:
        if file is not None:
            options["training_file"] = client.files.create(existing(file)).id
        if validation is not None:
            options["validation_file"] = client.files.create(existing(validation)).id
        job = client.jobs.create(**options)
        if not follow:
            print_job(job, as_json=as_json)
            if not as_json:
                err().print(f"[dim]watch it: promptd jobs watch {job.id}[/]")
            return
        err().print(f"[dim]{job.id}[/]")
        _watch(client, job.id, as_json=as_json)


@app.command("ls", rich_help_panel="Look")
def list_jobs(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List your jobs, newest first."""
    with connected(url, api_key) as client:
        jobs = client.jobs.list()
    if as_json:
        for job in jobs:
            print_json(job.model_dump())
        return
    if not jobs:
        err().print("[dim]no jobs yet: promptd jobs create FILE[/]")
        return
    print_table(jobs)


@app.command(rich_help_panel="Look")
def show(
    job_id: JobId,
    num_events: Annotated[int, typer.Option("--events", help="So many of the last events.", min=0, max=1000)] = 10,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show a job: its settings, how far it is, what came of it, and what happened last."""
    with connected(url, api_key) as client:
        job = client.jobs.get(job_id)
        events = client.jobs.events(job_id, limit=num_events) if num_events else []
    if as_json:
        print_json({**job.model_dump(), "events": [event.model_dump() for event in reversed(events)]})
    else:
        print_details(job, events)


@app.command(rich_help_panel="Look")
def watch(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Watch a job until it ends; status 1 unless it succeeds. Ctrl-C leaves it running."""
    with connected(url, api_key) as client:
        _watch(client, job_id, as_json=as_json)


@app.command(rich_help_panel="Change")
def cancel(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Cancel a job. A running one stops within a step."""
    with connected(url, api_key) as client:
        job = client.jobs.cancel(job_id)
    # OpenAI knows no word for a job that is about to stop.
    print_job(job if job.has_ended or as_json else job.model_copy(update={"status": "cancelling"}), as_json=as_json)


@app.command(rich_help_panel="Change")
def pause(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Pause a job. What it has learned is kept."""
    with connected(url, api_key) as client:
        print_job(client.jobs.pause(job_id), as_json=as_json)


@app.command(rich_help_panel="Change")
def resume(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Put a paused job back in line."""
    with connected(url, api_key) as client:
        print_job(client.jobs.resume(job_id), as_json=as_json)


@app.command(rich_help_panel="Change")
def rm(
    job_ids: Annotated[list[str], typer.Argument(help="Ids of jobs that have ended.", metavar="JOB...")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Forget jobs that have ended, with their events. Their prompts stay."""
    with connected(url, api_key) as client:
        for job_id in job_ids:
            client.jobs.delete(job_id)
            out().print(f"{job_id}  forgotten", soft_wrap=True)


def _watch(client: Client, job_id: str, *, as_json: bool) -> None:
    from promptd.commands.job_progress import job_progress

    try:
        with job_progress(client.jobs.get(job_id)) as show:
            job = client.jobs.wait(job_id, on_event=show)
    except KeyboardInterrupt:
        err().print(f"[dim]the job goes on; watch it again: promptd jobs watch {job_id}[/]")
        raise typer.Exit(130) from None
    print_job(job, as_json=as_json)
    if job.status != "succeeded":
        raise typer.Exit(1)
    err().print(f'[dim]ask it: POST /v1/completions {{"model": "{job.prompt}", "prompt": "…"}}[/]')
