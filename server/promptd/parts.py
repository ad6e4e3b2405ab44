"""What the settings name, made: limits, keys, model, engine, store, queue, worker. `create_app` puts it together."""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path

import structlog
from promptd_store import Bounds, PromptCatalog, is_shared, largest_file, open_store

from promptd.api.services import Limits
from promptd.demo import DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_PROMPTS_PATH, DEMO_TENANT
from promptd.engine.async_engine import AsyncEngine
from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.errors import InvalidRequestError
from promptd.jobs import JobClaims, JobLimits, JobQueue, JobRecord
from promptd.modeling import FrozenModel, load_model
from promptd.modeling.tensor_parallel import load_parallel
from promptd.processors import use_threads
from promptd.settings import DEFAULT_TENANT, Settings, parse_keys
from promptd.tenancy import Gate, KeyRing, PlacePool, RateMeter, ServerBudgets, SlotPool, TenantDirectory, UsageLedger
from promptd.timed_store import Observer, timed
from promptd.training import TrainingLoop, TrainingWorker
from promptd.training.job_spec import check_spec
from promptd.vetting import Vetting

_log = structlog.get_logger("promptd")


def make_limits(settings: Settings) -> Limits:
    """Return what the routes hold their callers to."""
    return Limits(
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        spool_folder=_spool_folder(settings),
        request_timeout_seconds=settings.request_timeout_seconds,
        drain_seconds=settings.drain_seconds,
        leave_seconds=settings.leave_seconds,
        max_prefix_tokens=settings.max_prefix_tokens,
        uploads=settings.uploads,
        stall_seconds=settings.stall_seconds,
        stream_interval_seconds=settings.stream_interval_seconds,
    )


def _spool_folder(settings: Settings) -> Path | None:
    """Return the folder in which large uploads wait: the store's or that of its blobs, where there is one."""
    place = settings.blobs if is_shared(settings.store) else settings.store
    return None if place is None or is_shared(place) else Path(place)


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


def make_gate(tenants: TenantDirectory, budgets: ServerBudgets, engine: Engine, server_id: str) -> Gate:
    """Make what lets requests in and counts them, under a name of this process."""
    store = tenants.book.store
    places = PlacePool(store, server_id, engine.scheduler.waiting.num_waiting)
    return Gate(tenants, budgets, RateMeter(store), SlotPool(store, server_id), places, UsageLedger(store, server_id))


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
    use_threads(settings.threads)
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
        max_num_mixed_tokens=settings.max_num_mixed_tokens,
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


def make_trial_engine(settings: Settings, model: FrozenModel, loop: TrainingLoop) -> AsyncEngine:
    """Make the engine that tries what a worker has trained: room for one longest row behind one longest prompt.

    It trains in its spare time, because one thread alone is to compute: see `promptd_store.passing_thread`.
    """
    longest = model.spec.max_model_len * model.bytes_per_slot
    config = EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_mixed_tokens=settings.max_num_mixed_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=min(settings.kv_cache_bytes, 2 * longest),
        prompt_cache_bytes=min(settings.prompt_cache_bytes, 3 * longest),  # a prefix may have three banks
        strict=settings.strict,
    )
    return AsyncEngine(Engine(model, config), loop)


def make_worker(settings: Settings, catalog: PromptCatalog, loop: TrainingLoop, vetting: Vetting) -> TrainingWorker:
    """Make what runs the jobs of this base model's queue; prompts are tried on the engine beside it."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    claims = JobClaims(catalog.store, catalog.spec.fingerprint, owner, limits=_job_limits(settings))

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
        examine=vetting.examine,
        on_job=on_job,
        on_error=on_error,
    )


async def open_catalog(settings: Settings, model: FrozenModel, observe: Observer | None = None) -> PromptCatalog:
    """Open the store that the settings name, for the running event loop; `observe` is told of every call of it.

    A store that would lose data is refused, or where that is allowed each fault is logged.
    """
    store = await open_store(
        settings.store,
        blobs=settings.blobs,
        allow_volatile=settings.allow_volatile_store,
        on_fault=lambda fault: _log.warning("volatile_store", fault=fault),
    )
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


def make_queue(settings: Settings, catalog: PromptCatalog) -> JobQueue | None:
    """Open the queue of training jobs for this base model, unless training is off."""
    if settings.training == "off":
        return None
    return JobQueue(catalog.store, catalog.spec.fingerprint, check=check_spec, limits=_job_limits(settings))


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


def _job_limits(settings: Settings) -> JobLimits:
    return JobLimits(settings.max_queued_jobs, settings.max_running_jobs)
