"""Probes, metrics, version, engine statistics."""

from __future__ import annotations

import dataclasses

from fastapi import Request, Response
from fastapi.responses import JSONResponse

import promptd
from promptd.api.services import services_of

#: A step over a full batch takes well under a second: after ten others had better be asked.
MAX_SILENT_SECONDS = 10.0
#: A step of a large model on few cores may take longer than that, and who restarts the server ends all that it does.
MAX_STALLED_SECONDS = 120.0
METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def livez(request: Request) -> Response:
    """Whether the engine makes steps while it has work; idle is healthy."""
    silent = services_of(request).engine.seconds_since_progress()
    if silent > MAX_STALLED_SECONDS:
        return JSONResponse({"status": "stalled", "seconds_since_progress": min(silent, 1e9)}, status_code=503)
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether new requests are welcome.

    They are while the store is away: it is so for all servers alike, and prompts in memory are served.
    """
    services = services_of(request)
    if services.leaving.has_begun or services.is_draining:
        return JSONResponse({"status": "draining"}, status_code=503)
    if services.engine.seconds_since_progress() > MAX_SILENT_SECONDS:
        return JSONResponse({"status": "stalled"}, status_code=503)
    return JSONResponse({"status": "ok", "store": "ok" if services.catalog.store.is_up else "away"})


async def startupz(request: Request) -> Response:
    """Whether the model is loaded and proven: this route answers only then."""
    return JSONResponse({"status": "ok", "model": services_of(request).model.served_name})


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(services_of(request).render_metrics(), media_type=METRICS_MEDIA_TYPE)


async def version() -> Response:
    """The server's version."""
    return JSONResponse({"version": promptd.__version__})


async def engine_stats(request: Request) -> Response:
    """Everything that the engine counts, and the tenants that have work in it."""
    services = services_of(request)
    return JSONResponse(
        {
            "model": services.model.served_name,
            "architecture": services.model.spec.architecture,
            "fingerprint": services.model.spec.fingerprint,
            "device": str(services.model.device),
            "dtype": services.model.spec.serving_dtype,
            "config": dataclasses.asdict(services.engine.engine.config),
            "stats": dataclasses.asdict(services.engine.stats()),
            "shares": [dataclasses.asdict(share) for share in services.engine.engine.scheduler.waiting.readings()],
        }
    )


async def list_servers(request: Request) -> Response:
    """List the servers that share this store, and what each does now."""
    return JSONResponse({"object": "list", "data": await services_of(request).roster.list()})
