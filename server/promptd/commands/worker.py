"""`promptd worker`: the training jobs of a server, in a process of their own over the same store."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import BaseModel, err, fail, quiet_loading
from promptd.commands.launch import (
    AllowVolatileStore,
    BlobsAddress,
    StoreAddress,
    read_settings,
    shown_store,
    stop_signal,
)

if TYPE_CHECKING:
    from promptd.settings import Settings


def worker(
    model: BaseModel = None,
    store: StoreAddress = None,
    blobs: BlobsAddress = None,
    allow_volatile_store: AllowVolatileStore = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N (auto).")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 (auto).")] = None,
    max_training_jobs: Annotated[
        int | None, typer.Option(help="Jobs that train at once; they share passes (16).", metavar="N")
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(help="Training that a killed worker may lose (10).", metavar="S")
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option("--strict/--no-strict", help="A prompt's bits depend on no other job; slower."),
    ] = None,
) -> None:
    """Run the training jobs of a server that leaves them to workers: `promptd serve --training worker`.

    Workers need the server's model and its store; one that has another model finds no jobs and waits. Start as many as
    you like: each job runs on one of them, and goes on elsewhere when its worker is gone. Ctrl-C or SIGTERM saves every
    running job and puts it back in line.

    Every option is also an environment variable: --max-training-jobs is PROMPTD_MAX_TRAINING_JOBS.

    [dim]promptd serve --training worker[/]
    [dim]promptd worker[/]                     (in another terminal, same folder)
    [dim]promptd worker --model ./Qwen2-0.5B --store /data/prompts --device cuda:1[/]
    """
    settings = read_settings(locals())
    err().print(f"[bold]promptd worker[/] loading {settings.model or 'the embedded demo model'} …")
    from promptd_store import StoreError

    from promptd import logs
    from promptd.errors import PromptdError

    logs.configure(secrets=settings.secrets)
    quiet_loading()
    try:
        asyncio.run(run_worker(settings))
    except (PromptdError, StoreError) as error:
        fail(str(error))


async def run_worker(settings: Settings) -> None:
    """Run jobs until a signal comes, then let go of them. Raises what ends the training thread."""
    from promptd.erasures import Forgetter
    from promptd.parts import load_base_model, make_worker, open_catalog
    from promptd.training import TrainingLoop

    stop = stop_signal()
    model = await asyncio.to_thread(load_base_model, settings)
    catalog = await open_catalog(settings, model)
    loop, loop_stop = TrainingLoop(model, strict=settings.strict), threading.Event()
    trainer = asyncio.create_task(asyncio.to_thread(loop.run_until, loop_stop))
    jobs = asyncio.create_task(make_worker(settings, catalog, loop).run())
    forgetting = asyncio.create_task(Forgetter(catalog, None).follow())
    stopped = asyncio.create_task(stop.wait())
    err().print(f"[bold green]ready[/] for jobs of {model.served_name} in {shown_store(settings)}")
    try:
        await asyncio.wait({trainer, jobs, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (jobs, forgetting, stopped):
            task.cancel()
        await asyncio.wait({jobs, forgetting})  # the last checkpoints need the training thread
        loop_stop.set()
        loop.wake()
        await asyncio.wait({trainer})
        await catalog.store.close()
    for task in (trainer, jobs):
        if not task.cancelled():
            await task
