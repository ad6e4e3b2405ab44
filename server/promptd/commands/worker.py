"""`promptd worker`: the training jobs of a server, in a process of their own over the same store."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import BaseModel, err, fail, quiet_loading
from promptd.commands.launch import (
    AllowVolatileStore,
    BlobsAddress,
    StoreAddress,
    Threads,
    listen,
    read_settings,
    shown_address_of,
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
    threads: Threads = None,
    max_training_jobs: Annotated[
        int | None, typer.Option(help="Jobs that train at once; they share passes (16).", metavar="N")
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(help="Training that a killed worker may lose (10).", metavar="S")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Answer /metrics (Prometheus) and /livez on this port (nowhere).", metavar="N"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address for --metrics-port (127.0.0.1).")] = None,
    probe_suite: Annotated[
        str | None,
        typer.Option(help="JSON lines that every prompt must pass before it is published.", metavar="FILE"),
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
    [dim]promptd worker --model ./Qwen2-0.5B --store /data/prompts --device cuda:1 --metrics-port 9100[/]
    """
    settings = read_settings(locals())
    port = settings.metrics_port
    with contextlib.nullcontext() if port is None else listen(settings.host, port, "--metrics-port") as listener:
        _start(settings, listener)


def _start(settings: Settings, listener: socket.socket | None) -> None:
    err().print(f"[bold]promptd worker[/] loading {settings.model or 'the embedded demo model'} …")
    import promptd.modeling.heavy_imports  # noqa: F401, before the store imports torch  # isort: skip
    from promptd_store import StoreError

    from promptd import logs
    from promptd.errors import PromptdError

    logs.configure(secrets=settings.secrets)
    quiet_loading()
    try:
        asyncio.run(run_worker(settings, listener))
    except (PromptdError, StoreError) as error:
        fail(str(error))


async def run_worker(settings: Settings, listener: socket.socket | None = None) -> None:
    """Run jobs until a signal comes, then let go of them; answer scrapes and probes on `listener` meanwhile.

    Raises what ends the thread that trains.
    """
    from promptd.collectors import CatalogCollector, TrainingCollector
    from promptd.erasures import Forgetter
    from promptd.metrics import LoopMetrics, StoreMetrics, make_registry
    from promptd.metrics_server import MetricsServer
    from promptd.parts import load_base_model, make_trial_engine, make_worker, open_catalog
    from promptd.training import TrainingLoop
    from promptd.vetting import Vetting, read_probes

    stop, registry = stop_signal(), make_registry()
    probes = read_probes(settings.probe_suite) if settings.probe_suite is not None else ()
    model = await asyncio.to_thread(load_base_model, settings)
    catalog = await open_catalog(settings, model, StoreMetrics(registry).observe)
    loop, ticks = TrainingLoop(model, strict=settings.strict), LoopMetrics(registry)
    engine = make_trial_engine(settings, model, loop)
    worker = make_worker(settings, catalog, loop, Vetting(engine, probes, settings.request_timeout_seconds))
    for collector in (CatalogCollector(catalog), TrainingCollector(worker)):
        registry.register(collector)
    answering: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if listener is not None:

        def seconds_silent() -> float:
            return max(loop.seconds_in_pass(), engine.seconds_since_progress(), ticks.seconds_since_tick())

        answering = MetricsServer(listener, registry, seconds_silent)
        err().print(f"[bold]metrics[/] {shown_address_of(listener)}/metrics")
    engine.start()
    trainer = asyncio.create_task(engine.ended())
    jobs = asyncio.create_task(worker.run())
    stopped = asyncio.create_task(stop.wait())
    others = [asyncio.create_task(Forgetter(catalog, engine).follow()), asyncio.create_task(ticks.run())]
    err().print(f"[bold green]ready[/] for jobs of {model.served_name} in {shown_store(settings)}")
    try:
        with answering:
            await asyncio.wait({trainer, jobs, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (jobs, stopped, *others):
            task.cancel()
        await asyncio.wait({jobs, *others})  # the last checkpoints need the training thread
        await engine.shutdown()
        await asyncio.wait({trainer})
        await catalog.store.close()
    for task in (trainer, jobs):
        if not task.cancelled():
            await task
