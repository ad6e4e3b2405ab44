"""`create_app`: wiring and lifespan, no logic."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from prometheus_client import generate_latest
from promptd_store import PromptCatalog, StoreError, is_shared

import promptd
from promptd.api.error_handlers import OversizeEnvelope, UnexpectedErrors, install
from promptd.api.leaving import CloseWhenLeaving
from promptd.api.routes import add_routes
from promptd.api.services import Services
from promptd.api.shedding import Shedding
from promptd.api.wire import KeepWire
from promptd.collectors import BudgetCollector, CatalogCollector, EngineCollector, TrainingCollector
from promptd.engine.async_engine import AsyncEngine
from promptd.erasures import Forgetter
from promptd.housekeeping import Housekeeper
from promptd.jobs import TrainingFiles
from promptd.logs import RefusedCount, RequestLog
from promptd.metrics import (
    HousekeepingMetrics,
    HttpMetrics,
    LoopMetrics,
    RequestMetrics,
    StoreMetrics,
    TokenGaps,
    make_registry,
)
from promptd.parts import (
    make_budgets,
    make_engine,
    make_gate,
    make_key_ring,
    make_limits,
    make_queue,
    make_worker,
    open_catalog,
    publish_demo,
)
from promptd.roster import Roster, describe_server
from promptd.settings import Settings
from promptd.suspicion import Quarantine
from promptd.tenancy import CallLog, Eraser, KeyOffice, TenantBook, TenantDirectory, note_beginning
from promptd.tracing import NO_TELEMETRY, Tracing, open_tracing
from promptd.training import TrainingLoop
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
    limits = make_limits(settings)
    probes = read_probes(settings.probe_suite) if settings.probe_suite is not None else ()

    registry = make_registry()
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
        gate = make_gate(tenants, make_budgets(settings, served.engine), served.engine, server_id)
        roster = Roster(prompts.store, server_id, describe_server(served), is_shared=is_shared(settings.store))
        forgetter = Forgetter(prompts, served, roster.acknowledge)
        vetting = Vetting(served, probes, settings.request_timeout_seconds, tenants.weight_of)
        calls = CallLog(prompts.store)
        await note_beginning(prompts.store, time.time())
        registry.register(EngineCollector(served))
        registry.register(BudgetCollector(gate.budgets))
        registry.register(CatalogCollector(prompts))
        gaps = TokenGaps()
        registry.register(gaps)
        app.state.services = Services(
            engine=served,
            limits=limits,
            catalog=prompts,
            vetting=vetting,
            quarantine=Quarantine(tenants, vetting),
            files=TrainingFiles(prompts.store, max_bytes=settings.max_upload_bytes),
            jobs=make_queue(settings, prompts),
            keys=keys,
            key_office=KeyOffice(tenants, keys.key_secret),
            tenants=tenants,
            gate=gate,
            eraser=Eraser(prompts, tenants, forgetter.forget, roster.acknowledged),
            roster=roster,
            calls=calls,
            observe=RequestMetrics(registry).observe,
            observe_gap=gaps.observe,
            render_metrics=lambda: generate_latest(registry),
            trace=tracing.record if tracing is not None else lambda trail: None,
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
    add_routes(app.router, limits)
    app.add_middleware(UnexpectedErrors)
    app.add_middleware(OversizeEnvelope)
    app.add_middleware(CloseWhenLeaving, app.state)
    http_metrics = HttpMetrics(registry)
    app.add_middleware(RequestLog, observe=http_metrics.observe, tracing=tracing)
    app.add_middleware(KeepWire)
    app.state.shedding = Shedding(app.state, http_metrics.observe, RefusedCount().add)
    install(app)
    return app
