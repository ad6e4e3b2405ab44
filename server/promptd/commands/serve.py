"""`promptd serve`: the settings from the command line, and one uvicorn server around the application."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import err, fail, quiet_loading
from promptd.commands.launch import (
    AllowVolatileStore,
    BlobsAddress,
    StoreAddress,
    Threads,
    listen,
    read_settings,
    shown_address_of,
    shown_store,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from promptd.settings import Settings

_MODEL, _ENGINE, _TRAINING, _LIMITS, _SWITCHES = "Model", "Engine", "Training", "Limits", "Switches"


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id. Default: the embedded demo.", metavar="PATH_OR_ID", rich_help_panel=_MODEL
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Its name in the API. Default: the folder's last part.", rich_help_panel=_MODEL)
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1). Others need keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (8000).", metavar="N")] = None,
    store: StoreAddress = None,
    blobs: BlobsAddress = None,
    allow_volatile_store: AllowVolatileStore = None,
    threads: Threads = None,
    training: Annotated[
        str | None,
        typer.Option(
            help="Where jobs run: inline, worker (other processes) or off (inline).", rich_help_panel=_TRAINING
        ),
    ] = None,
    training_seconds_per_step: Annotated[
        float | None,
        typer.Option(
            help="What training adds, on average, to a step while requests run (0.005).",
            metavar="S",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    max_training_jobs: Annotated[
        int | None, typer.Option(help="Jobs that train at once (16).", metavar="N", rich_help_panel=_TRAINING)
    ] = None,
    checkpoint_seconds: Annotated[
        float | None,
        typer.Option(help="Training that a killed server may lose (10).", metavar="S", rich_help_panel=_TRAINING),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N (auto).", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16 (auto).", rich_help_panel=_MODEL)
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="none or int8: faster on a CPU, not exact (none).", rich_help_panel=_MODEL)
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            help="Devices of this machine that a decoder is divided over (1).", metavar="N", rich_help_panel=_MODEL
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest row, in tokens (the model's own limit).", metavar="N", rich_help_panel=_MODEL),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Rows that run at once (16).", metavar="N", rich_help_panel=_ENGINE)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step (2048).", metavar="N", rich_help_panel=_ENGINE)
    ] = None,
    max_num_mixed_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a step reads beside rows that write: fewer make tokens come evenly (32 to 256).",
            metavar="N",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_cache_bytes: Annotated[
        int | None, typer.Option(help="K/V of texts (1 GiB).", metavar="N", rich_help_panel=_ENGINE)
    ] = None,
    prompt_cache_bytes: Annotated[
        int | None, typer.Option(help="K/V of learned prompts (1 GiB).", metavar="N", rich_help_panel=_ENGINE)
    ] = None,
    artifact_cache_bytes: Annotated[
        int | None, typer.Option(help="Prompts kept in host memory (256 MiB).", metavar="N", rich_help_panel=_ENGINE)
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that may wait (256).", metavar="N", rich_help_panel=_LIMITS)
    ] = None,
    max_open_requests: Annotated[
        int | None,
        typer.Option(
            help="Inference requests open at a time (rows and queue, and a quarter more).",
            metavar="N",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_open_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens, in and out, of open requests (the longest row of each).", metavar="N", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_open_upload_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes of files on their way, in or out, at a time (1 GiB).", metavar="N", rich_help_panel=_LIMITS
        ),
    ] = None,
    stall_seconds: Annotated[
        float | None,
        typer.Option(
            help="A client that neither sends nor reads for so long is let go (30).",
            metavar="S",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    stream_interval_seconds: Annotated[
        float | None,
        typer.Option(
            help="Tokens of a stream that come within so long leave together (0).", metavar="S", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_queue_seconds: Annotated[
        float | None,
        typer.Option(help="Longest wait for a first step (no limit).", metavar="S", rich_help_panel=_LIMITS),
    ] = None,
    max_first_token_seconds: Annotated[
        float | None,
        typer.Option(help="Longest wait for a first token (no limit).", metavar="S", rich_help_panel=_LIMITS),
    ] = None,
    batch_wait_seconds: Annotated[
        float | None,
        typer.Option(help="Wait of an idle engine for a fuller batch (0).", metavar="S", rich_help_panel=_LIMITS),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Largest JSON body (1 MiB).", metavar="N", rich_help_panel=_LIMITS)
    ] = None,
    max_upload_bytes: Annotated[
        int | None, typer.Option(help="Largest training file (64 MiB).", metavar="N", rich_help_panel=_LIMITS)
    ] = None,
    max_prefix_tokens: Annotated[
        int | None,
        typer.Option(help="Virtual tokens of an uploaded prompt (2048).", metavar="N", rich_help_panel=_LIMITS),
    ] = None,
    uploads: Annotated[
        str | None,
        typer.Option(help="Learned prompts that are taken: none, trained-here or any (any).", rich_help_panel=_LIMITS),
    ] = None,
    probe_suite: Annotated[
        str | None,
        typer.Option(
            help="JSON lines that every prompt must pass before it is published (none).",
            metavar="FILE",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    request_timeout_seconds: Annotated[
        float | None, typer.Option(help="Longest request (600).", metavar="S", rich_help_panel=_LIMITS)
    ] = None,
    outage_seconds: Annotated[
        float | None,
        typer.Option(
            help="While the store is away, prompts in memory serve on (300).", metavar="S", rich_help_panel=_LIMITS
        ),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(help="Time for open requests when the server stops (30).", metavar="S", rich_help_panel=_LIMITS),
    ] = None,
    leave_seconds: Annotated[
        float | None,
        typer.Option(
            help="At SIGTERM, time to serve on while /readyz already says no: two checks of a load balancer (2).",
            metavar="S",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    housekeeping_seconds: Annotated[
        float | None,
        typer.Option(help="Time between two clean-ups of the store (600).", metavar="S", rich_help_panel=_LIMITS),
    ] = None,
    garbage_age_seconds: Annotated[
        float | None,
        typer.Option(help="Age at which files of deleted prompts go (86400).", metavar="S", rich_help_panel=_LIMITS),
    ] = None,
    keep_versions: Annotated[
        int | None,
        typer.Option(help="Versions of each prompt that are kept (all).", metavar="N", rich_help_panel=_LIMITS),
    ] = None,
    unused_days: Annotated[
        int | None,
        typer.Option(
            help="Days without use after which a prompt is deleted (never).", metavar="D", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_queued_jobs: Annotated[
        int | None,
        typer.Option(help="Training jobs of one tenant that may wait (10000).", metavar="N", rich_help_panel=_LIMITS),
    ] = None,
    max_running_jobs: Annotated[
        int | None,
        typer.Option(help="Training jobs of one tenant that run at once (64).", metavar="N", rich_help_panel=_LIMITS),
    ] = None,
    job_history_days: Annotated[
        float | None,
        typer.Option(help="Days that ended training jobs are listed (30).", metavar="D", rich_help_panel=_LIMITS),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(help="OpenTelemetry collector (OTLP over HTTP) that gets traces.", metavar="URL"),
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option(
            " /--no-prefix-caching",
            help="Compute every text anew.",
            rich_help_panel=_SWITCHES,
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict", help="A row's bits depend on no neighbour; slower.", rich_help_panel=_SWITCHES
        ),
    ] = None,
) -> None:
    """Serve one frozen model under many learned prompts.

    Every option is also an environment variable: --max-num-seqs is PROMPTD_MAX_NUM_SEQS. Keys come from there only:
    PROMPTD_API_KEYS=tenant:key,… and PROMPTD_ADMIN_KEY.

    [dim]promptd serve[/]
    [dim]promptd serve --model ./Qwen2-0.5B --max-num-seqs 32[/]
    [dim]PROMPTD_API_KEYS=acme:s3cret-key promptd serve --host 0.0.0.0[/]
    [dim]PROMPTD_STORE=redis://:password@redis/0 promptd serve[/]
    """
    settings = read_settings(locals())
    with listen(settings.host, settings.port) as listener:
        err().print(f"[bold]promptd[/] loading {settings.model or 'the embedded demo model'} …")
        _start(settings, listener)


def _start(settings: Settings, listener: socket.socket) -> None:
    import promptd.modeling.heavy_imports  # noqa: F401, before the store imports torch  # isort: skip
    from promptd_store import StoreError

    from promptd import logs
    from promptd.app import create_app
    from promptd.commands.http_server import run_server
    from promptd.errors import PromptdError

    try:
        app = create_app(settings)
        logs.configure(secrets=settings.secrets)
        quiet_loading()
        asyncio.run(run_server(app, settings, listener, partial(_announce, app, settings, listener)))
    except (PromptdError, StoreError) as error:
        fail(str(error))


def _announce(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    address = shown_address_of(listener)
    name = app.state.services.model.served_name
    key = "" if app.state.services.keys.is_open else " -H 'Authorization: Bearer KEY'"
    console = err()
    console.print(f"[bold green]ready[/] {name} at [bold]{address}[/], prompts in {shown_store(settings)}")
    console.print(f"[bold]console[/] {address}/ui/")
    console.print(
        f"[dim]curl {address}/v1/completions{key} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{name}", "prompt": "Once upon a time", "max_tokens": 16}}'[/]"""
    )
