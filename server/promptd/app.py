"""`create_app`: wiring and lifespan, no logic."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from promptd_store import Bounds, PromptCatalog, Store, StoreError, is_shared, largest_file, open_store

import promptd
from promptd.api.error_handlers import OversizeEnvelope, install
from promptd.api.leaving import CloseWhenLeaving
from promptd.api.routes import build_router
from promptd.api.services import Limits, Services
from promptd.demo import DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_PROMPTS_PATH, DEMO_TENANT
from promptd.engine.async_engine import AsyncEngine
from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.erasures import Forgetter
from promptd.errors import InvalidRequestError
from promptd.housekeeping import Housekeeper
from promptd.jobs import JobClaims, JobLimits, JobQueue, JobRecord, TrainingFiles
from promptd.logs import RequestLog
from promptd.metrics import (
    BudgetCollector,
    CatalogCollector,
    EngineCollector,
    HousekeepingMetrics,
    HttpMetrics,
    LoopMetrics,
    RequestMetrics,
    StoreMetrics,
    TrainingCollector,
)
from promptd.modeling import FrozenModel, load_model
from promptd.modeling.tensor_parallel import load_parallel
from promptd.roster import Roster, describe_server
from promptd.settings import DEFAULT_TENANT, Settings, parse_keys
from promptd.suspicion import Quarantine
from promptd.tenancy import (
    CallLog,
    Eraser,
    Gate,
    KeyOffice,
    KeyRing,
    RateMeter,
    ServerBudgets,
    SlotPool,
    TenantBook,
    TenantDirectory,
    UsageLedger,
    note_beginning,
)
from promptd.timed_store import Observer, timed
from promptd.tracing import NO_TELEMETRY, Tracing, open_tracing
from promptd.training import TrainingLoop, TrainingWorker
from promptd.training.job_spec import check_spec
from promptd.vetting import Vetting, read_probes

_log = structlog.get_logger("promptd")


def create_app(
    settings: Settings,
    *,
    engine: AsyncEngine | None = None,
    catalog: PromptCatalog | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Make the application; model, store and tracing are opened as the settings say unless they are given.

    Raises `InvalidRequestError` where the settings would leave the server open to others without keys.
    """
    keys = make_key_ring(settings)
    limits = Limits(
        settings.max_body_bytes,
        settings.max_upload_bytes,
        settings.request_timeout_seconds,
        settings.drain_seconds,
        settings.leave_seconds,
        settings.max_prefix_tokens,
        settings.uploads,
        settings.stall_seconds,
    )
    probes = read_probes(settings.probe_suite) if settings.probe_suite is not None else ()

    registry = CollectorRegistry()
    if tracing is None and settings.traces is not None:
        tracing = open_tracing(settings.traces, promptd.__version__)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served = engine if engine is not None else await asyncio.to_thread(make_engine, settings)
        prompts = catalog or await open_catalog(settings, served.engine.model, StoreMetrics(registry).observe)
        if settings.model is None and catalog is None:
            await publish_demo(prompts)
        tenants = TenantDirectory(TenantBook(prompts.store))
        await tenants.poll()
        await keys.connect(tenants)
        server_id = secrets.token_hex(8)
        gate = make_gate(tenants, make_budgets(settings, served.engine), server_id)
        roster = Roster(prompts.store, server_id, describe_server(served), is_shared=is_shared(settings.store))
        forgetter = Forgetter(prompts, served)
        vetting = Vetting(served, probes, settings.request_timeout_seconds, tenants.weight_of)
        calls = CallLog(prompts.store)
        await note_beginning(prompts.store, time.time())
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        registry.register(EngineCollector(served))
        registry.register(BudgetCollector(gate.budgets))
        registry.register(CatalogCollector(prompts))
        app.state.services = Services(
            served,
            prompts,
            TrainingFiles(prompts.store, max_bytes=settings.max_upload_bytes),
            make_queue(settings, prompts),
            keys,
            KeyOffice(tenants, keys.key_secret),
            tenants,
            gate,
            vetting,
            Quarantine(tenants, vetting),
            roster,
            Eraser(prompts, tenants, forgetter.forget),
            calls,
            limits,
            RequestMetrics(registry).observe,
            lambda: generate_latest(registry),
            tracing.record if tracing is not None else lambda trail: None,
        )
        housekeeper = Housekeeper(
            prompts.store,
            HousekeepingMetrics(registry),
            interval_seconds=settings.housekeeping_seconds,
            min_age_seconds=settings.garbage_age_seconds,
            keep_jobs_seconds=settings.job_history_days * 86400,
            keep_versions=settings.keep_versions,
            unused_days=settings.unused_days,
        )
        background = [
            asyncio.create_task(housekeeper.run()),
            asyncio.create_task(LoopMetrics(registry).run()),
            asyncio.create_task(tenants.follow()),
            asyncio.create_task(gate.keep()),
            asyncio.create_task(roster.keep()),
            asyncio.create_task(forgetter.follow()),
            asyncio.create_task(calls.keep()),
            asyncio.create_task(prompts.follow_changes()),
        ]
        if isinstance(served.spare_time, TrainingLoop):
            worker = make_worker(settings, prompts, served.spare_time, vetting)
            registry.register(TrainingCollector(worker))
            background.append(asyncio.create_task(worker.run()))
        served.start()
        _log.info("ready", model=served.engine.model.served_name, keys_needed=not keys.is_open)
        try:
            yield
        finally:
            for task in background:  # training first: a job's last checkpoint needs the engine's thread
                task.cancel()
            await asyncio.wait(background)
            await app.state.services.drain()
            with contextlib.suppress(StoreError):  # what is left lies in the store for no longer than it can hurt
                await gate.close()
                await roster.close()
                await calls.flush()
            if catalog is None:
                await prompts.store.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="promptd",
        version=promptd.__version__,
        description="One frozen model, many learned prompts, one batch.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere; `/docs` leads to our own
        redoc_url=None,
        telemetry=tracing.telemetry if tracing is not None else NO_TELEMETRY,
    )
    app.include_router(build_router(limits))
    app.add_middleware(OversizeEnvelope)
    app.add_middleware(CloseWhenLeaving, app.state)
    app.add_middleware(RequestLog, observe=HttpMetrics(registry).observe, tracing=tracing)
    install(app)
    return app


def make_key_ring(settings: Settings) -> KeyRing:
    """Read the static keys; an address that others can reach needs at least one."""
    tenant_keys = parse_keys(settings.api_keys) if settings.api_keys is not None else {}
    admin_key = settings.admin_key.get_secret_value() if settings.admin_key is not None else None
    key_secret = settings.key_secret.get_secret_value().encode() if settings.key_secret is not None else None
    keys = KeyRing(tenant_keys, admin_key, DEFAULT_TENANT, key_secret=key_secret)
    if keys.is_open and not settings.is_loopback:
        raise InvalidRequestError(
            f"host {settings.host!r} is reachable from outside: set PROMPTD_API_KEYS (tenant:key,…) "
            "or PROMPTD_ADMIN_KEY first",
            param="host",
        )
    return keys


def make_gate(tenants: TenantDirectory, budgets: ServerBudgets, server_id: str) -> Gate:
    """Make what lets requests in and counts them, under a name of this process."""
    store = tenants.book.store
    return Gate(tenants, budgets, RateMeter(store), SlotPool(store, server_id), UsageLedger(store, server_id))


def make_budgets(settings: Settings, engine: Engine) -> ServerBudgets:
    """Make what this server has to give out."""
    return ServerBudgets.of(
        max_waiting_or_running=engine.config.max_queue + engine.config.max_num_seqs,
        max_model_len=engine.max_model_len,
        max_open_requests=settings.max_open_requests,
        max_open_tokens=settings.max_open_tokens,
        max_open_upload_bytes=settings.max_open_upload_bytes,
    )


def load_base_model(settings: Settings) -> FrozenModel:
    """Load the model that the settings name, the demo's where they name none."""
    served_name = settings.served_model_name or (DEMO_MODEL_NAME if settings.model is None else None)
    if settings.tensor_parallel > 1:
        return load_parallel(
            settings.model or DEMO_MODEL_PATH,
            settings.tensor_parallel,
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            served_name=served_name,
        )
    return load_model(
        settings.model or DEMO_MODEL_PATH,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        quantization=settings.quantization,
        strict=settings.strict,
        served_name=served_name,
    )


def make_engine(settings: Settings) -> AsyncEngine:
    """Load the model and make the engine around it; inline training gets the engine's spare time."""
    model = load_base_model(settings)
    config = EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_bytes,
        prompt_cache_bytes=settings.prompt_cache_bytes,
        max_queue=settings.max_queue,
        max_queue_seconds=settings.max_queue_seconds,
        max_first_token_seconds=settings.max_first_token_seconds,
        batch_wait_seconds=settings.batch_wait_seconds,
        enable_prefix_caching=settings.enable_prefix_caching,
        strict=settings.strict,
    )
    spare_time = TrainingLoop(model, strict=settings.strict) if settings.training == "inline" else None
    return AsyncEngine(Engine(model, config), spare_time, spare_seconds_per_step=settings.training_seconds_per_step)


def make_worker(
    settings: Settings, catalog: PromptCatalog, loop: TrainingLoop, vetting: Vetting | None = None
) -> TrainingWorker:
    """Make what runs the jobs of this base model's queue; with an engine beside it, prompts are tried on that."""
    if vetting is None and settings.probe_suite is not None:
        raise InvalidRequestError(
            "a worker process has no engine to run a probe suite on: train in the server (--training inline), or "
            "without probe_suite",
            param="probe_suite",
        )
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    claims = JobClaims(catalog.store, catalog.spec.fingerprint, owner, limits=job_limits(settings))

    def on_job(job: JobRecord) -> None:
        step = 0 if job.progress is None else job.progress.step
        reason = {} if job.error is None else {"code": job.error.code}
        _log.info("job", job=job.id, tenant=job.tenant, state=job.state.value, step=step, **reason)

    def on_error(error: BaseException) -> None:
        _log.error("training", exc_info=error)

    return TrainingWorker(
        claims,
        catalog,
        loop,
        max_jobs=settings.max_training_jobs,
        checkpoint_seconds=settings.checkpoint_seconds,
        examine=None if vetting is None else vetting.examine,
        on_job=on_job,
        on_error=on_error,
    )


async def open_catalog(settings: Settings, model: FrozenModel, observe: Observer | None = None) -> PromptCatalog:
    """Open the store that the settings name, for the running event loop; `observe` is told of every call of it."""
    store = await open_settings_store(settings)
    if observe is not None:
        store = timed(store, observe)
    return PromptCatalog(
        store,
        model.spec,
        settings.artifact_cache_bytes,
        reserved_names={model.served_name},
        outage_seconds=settings.outage_seconds,
        bounds=Bounds(max_bytes=max(Bounds().max_bytes, largest_file(model.spec, None, settings.max_prefix_tokens))),
    )


async def open_settings_store(settings: Settings) -> Store:
    """Open the store; one that would lose data is refused, or where that is allowed each fault is logged."""

    def on_fault(fault: str) -> None:
        _log.warning("volatile_store", fault=fault)

    return await open_store(
        settings.store,
        blobs=settings.blobs,
        allow_volatile=settings.allow_volatile_store,
        on_fault=on_fault,
    )


def make_queue(settings: Settings, catalog: PromptCatalog) -> JobQueue | None:
    """Open the queue of training jobs for this base model, unless training is off."""
    if settings.training == "off":
        return None
    return JobQueue(catalog.store, catalog.spec.fingerprint, check=check_spec, limits=job_limits(settings))


def job_limits(settings: Settings) -> JobLimits:
    """Return what each tenant may train at a time."""
    return JobLimits(settings.max_queued_jobs, settings.max_running_jobs)


async def publish_demo(catalog: PromptCatalog) -> None:
    """Publish the demo's prompts for everyone; again and again is harmless."""
    for card in sorted(DEMO_PROMPTS_PATH.glob("*.json")):
        await catalog.publish(
            DEMO_TENANT,
            card.stem,
            card.with_suffix(".safetensors").read_bytes(),
            provenance=json.loads(card.read_text()),
            sidecar=card.with_suffix(".sidecar.safetensors").read_bytes(),
            visibility="public",
        )
