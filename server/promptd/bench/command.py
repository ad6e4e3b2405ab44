"""The command: options in, a table and a JSON file out."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from promptd.bench.target import EngineTarget, Target
from promptd.bench.workload import KINDS, SAFE_VOCAB_SIZE, BenchPrompt, Lengths, ModelSizes, Workload, make_prompts

if TYPE_CHECKING:
    from rich.console import Console

    from promptd.bench.report import BenchReport, RunSummary

_LOAD = "Load"
_MODEL = "In this process"
_PIPED_WIDTH = 120
_MAX_QUEUE = 256


def run(
    url: Annotated[
        str | None, typer.Option("--url", help="A running server. Without it, the model runs in this process.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="PROMPTD_API_KEY", help="Your key, if the server wants one.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base model: a folder or a hub id. Default: the demo.", metavar="PATH_OR_ID"),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file, too.", metavar="FILE")
    ] = None,
    requests: Annotated[
        int, typer.Option("--requests", "-n", min=1, help="Requests of a run.", rich_help_panel=_LOAD)
    ] = 64,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Requests open at once.", rich_help_panel=_LOAD)
    ] = 16,
    prompts: Annotated[
        int, typer.Option("--prompts", "-m", min=1, help="Distinct prompts, made up.", rich_help_panel=_LOAD)
    ] = 16,
    kinds: Annotated[
        str, typer.Option(help="Their kinds, in turn: soft, prefix, text, none.", rich_help_panel=_LOAD)
    ] = "soft,prefix,text",
    virtual_tokens: Annotated[
        str, typer.Option(help="Length of a prompt: 32, or 8-64.", metavar="N[-N]", rich_help_panel=_LOAD)
    ] = "8-64",
    input_tokens: Annotated[
        str, typer.Option(help="Length of a text.", metavar="N[-N]", rich_help_panel=_LOAD)
    ] = "32-128",
    output_tokens: Annotated[
        str, typer.Option(help="Tokens to generate.", metavar="N[-N]", rich_help_panel=_LOAD)
    ] = "32-64",
    use: Annotated[
        list[str] | None,
        typer.Option(help="Use this prompt of the server instead; repeatable.", metavar="NAME", rich_help_panel=_LOAD),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before it counts.", rich_help_panel=_LOAD)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that count.", rich_help_panel=_LOAD)] = 3,
    seed: Annotated[int, typer.Option(help="The same seed asks the same.", rich_help_panel=_LOAD)] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a matrix product.", rich_help_panel=_MODEL)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Rows that run at once.", rich_help_panel=_MODEL)] = 16,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse K/V of equal texts.", rich_help_panel=_MODEL)] = True,
) -> None:
    """Measure tokens per second and latencies with many prompts in the mix.

    Drives a running server, or an engine in this process. Prompts are made up;
    a server gets them first and has them deleted at the end.
    The status is 1 if any request failed.

    [dim]promptd bench --url http://127.0.0.1:8000 -n 200 -c 32[/]
    [dim]promptd bench --model ./my-model --kinds soft --virtual-tokens 32 --threads 2[/]
    """
    try:
        workload = Workload(
            num_requests=requests,
            num_prompts=len(use) if use else prompts,
            kinds=("named",) if use else tuple(kind.strip() for kind in kinds.split(",")),
            virtual_tokens=Lengths.parse(virtual_tokens),
            input_tokens=Lengths.parse(input_tokens),
            output_tokens=Lengths.parse(output_tokens),
            concurrency=concurrency,
            seed=seed,
        )
    except ValueError as error:
        _fail(str(error))
    unknown = set() if use else set(workload.kinds) - set(KINDS)
    if unknown:
        _fail(f"unknown kind {min(unknown)!r}", hint=f"There are {', '.join(KINDS)}.")
    if url is not None:
        target, chosen = _server(url, api_key, model, workload, use or [])
    elif use:
        _fail("--use names prompts of a server: it goes with --url")
    else:
        target, chosen = _engine(model, workload, threads, max_num_seqs, prefix_caching)
    report = _measure(target, workload, chosen, warmup, repeats)
    _console().print(report.to_table())
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    if report.num_failed:
        first = next(run.first_error for run in report.runs if run.first_error)
        _fail(f"{report.num_failed} requests failed; the first: {first}")


def _measure(
    target: Target, workload: Workload, prompts: Sequence[BenchPrompt], warmup: int, repeats: int
) -> BenchReport:
    import httpx

    from promptd.bench.driver import run_bench
    from promptd.bench.server import ServerError

    console = _console(stderr=True)

    def tell(label: str, run: RunSummary) -> None:
        console.print(f"[dim]{label}: {run.output_tokens_per_second:.1f} tokens/s in {run.seconds:.1f} s[/]")

    try:
        return asyncio.run(run_bench(target, workload, prompts, num_warmups=warmup, num_repeats=repeats, on_run=tell))
    except ServerError as error:
        _fail(str(error), hint="Made-up prompts must fit the server's base model: name it with --model.")
    except httpx.TransportError as error:
        _fail(f"no answer: {error}", hint="Is a server running there? Start one with: promptd serve")


def _server(
    url: str, api_key: str | None, model: str | None, workload: Workload, use: Sequence[str]
) -> tuple[Target, list[BenchPrompt]]:
    """A running server; made-up prompts take their sizes from the same base model's config, read here."""
    from promptd.bench.server import ServerTarget

    if use:
        prompts, vocab_size = [BenchPrompt(name, "named") for name in use], SAFE_VOCAB_SIZE
    else:
        sizes = _sizes(model)
        prompts, vocab_size = make_prompts(workload, sizes), sizes.vocab_size
    return ServerTarget(url, api_key=api_key, concurrency=workload.concurrency, vocab_size=vocab_size), prompts


def _sizes(model: str | None) -> ModelSizes:
    from transformers import AutoConfig

    from promptd.errors import ModelRefusedError
    from promptd.modeling.families.decoder import decoder_sizes

    try:
        config = AutoConfig.from_pretrained(_path(model), trust_remote_code=False)
        found = decoder_sizes(config)
    except (OSError, ValueError, ModelRefusedError) as error:
        _fail(f"cannot read the sizes of the base model: {error}", hint="Name the server's base model with --model.")
    return ModelSizes(config.vocab_size, found.hidden_size, found.num_layers, found.num_kv_heads, found.head_dim)


def _engine(
    model: str | None, workload: Workload, threads: int | None, max_num_seqs: int, prefix_caching: bool
) -> tuple[Target, list[BenchPrompt]]:
    """The model in this process."""
    import torch
    from transformers.utils import logging

    from promptd.engine.config import EngineConfig
    from promptd.engine.engine import Engine
    from promptd.errors import ModelRefusedError
    from promptd.modeling import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded = load_model(_path(model))
    except (OSError, ValueError, ModelRefusedError) as error:
        _fail(str(error))
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_queue=max(_MAX_QUEUE, workload.concurrency),
        enable_prefix_caching=prefix_caching,
    )
    return EngineTarget(Engine(loaded, config)), make_prompts(workload, ModelSizes.of_spec(loaded.spec))


def _path(model: str | None) -> str:
    from promptd.demo import DEMO_MODEL_PATH

    return model if model is not None else str(DEMO_MODEL_PATH)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(stderr=stderr, highlight=False, width=width, soft_wrap=stderr)


def _fail(message: str, *, hint: str | None = None) -> NoReturn:
    """Say what is wrong, and what would help; end with status 1."""
    from rich.markup import escape

    console = _console(stderr=True)
    console.print(f"[bold red]error[/] {escape(message)}")
    if hint is not None:
        console.print(f"[dim]{escape(hint)}[/]")
    raise typer.Exit(1)
