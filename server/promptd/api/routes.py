"""The one table of routes: method, path, scope, handler, largest body. Nothing else registers a route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi import APIRouter, Response

from promptd.api import (
    audit,
    chat,
    classify,
    completions,
    console,
    drain,
    embeddings,
    erasing,
    evaluation,
    files,
    fine_tuning,
    health,
    keys,
    models,
    openapi,
    prompts,
    quarantine,
    shares,
    tenants,
    training_jobs,
)
from promptd.api.guard import guarded
from promptd.api.services import Limits
from promptd.tenancy import Scope

Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table. Large bodies are those of files: they have the upload limit."""

    method: str
    path: str
    scope: Scope
    handler: Handler
    tag: str
    responses: openapi.Responses = field(default_factory=lambda: openapi.JSON)
    is_large: bool = False
    is_page: bool = False
    """For browsers: no part of the API's description."""
    takes_file: bool = False
    """The body is one file, which the handler reads itself."""
    operation: str = ""
    """What traces call it: OpenTelemetry's word where it has one."""
    also: Scope | None = None
    """A second scope that is needed."""

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """All scopes that a caller needs."""
        return (self.scope,) if self.also is None else (self.scope, self.also)

    def max_body_bytes(self, limits: Limits) -> int | None:
        """Return what a body may have; None where only the handler of a file knows: it depends on the model."""
        if self.takes_file:
            return None
        return limits.max_upload_bytes if self.is_large else limits.max_body_bytes

    @property
    def is_inference(self) -> bool:
        """Whether it asks the model: such requests take of the server's budgets of requests and tokens."""
        return self.scope is Scope.INFER and self.method == "POST"

    @property
    def changes(self) -> bool:
        """Whether a call is written down when it is answered; deeds to a tenant are, in the step that does them."""
        if self.method == "GET" or self.scope is Scope.INFER:
            return False
        return self.tag in ("prompts", "training") or self.path == "/admin/drain"


_P = "/v1/prompts"
_J = "/v1/fine_tuning/jobs"
ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/completions",
        Scope.INFER,
        completions.create_completion,
        "inference",
        openapi.STREAM,
        operation="text_completion",
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        Scope.INFER,
        chat.create_chat_completion,
        "inference",
        openapi.STREAM,
        operation="chat",
    ),
    Route("POST", "/v1/classify", Scope.INFER, classify.create_classification, "inference", operation="classify"),
    Route("POST", "/v1/embeddings", Scope.INFER, embeddings.create_embeddings, "inference", operation="embeddings"),
    Route("POST", "/tokenize", Scope.INFER, models.tokenize_text, "inference"),
    Route("POST", "/detokenize", Scope.INFER, models.detokenize, "inference"),
    Route("GET", "/v1/models", Scope.INFER, models.list_models, "models"),
    Route("GET", "/v1/models/{model:path}", Scope.INFER, models.get_model, "models"),
    Route("GET", _P, Scope.PROMPTS_READ, prompts.list_prompts, "prompts"),
    # The longer paths come first: `owner/name` may stand for a name, so the last one takes everything.
    Route("GET", _P + "/{name:path}/versions", Scope.PROMPTS_READ, prompts.list_versions, "prompts"),
    Route("GET", _P + "/{name:path}/content", Scope.PROMPTS_READ, prompts.get_content, "prompts", openapi.FILE),
    Route("GET", _P + "/{name:path}/neighbors", Scope.PROMPTS_READ, prompts.get_neighbors, "prompts"),
    Route("GET", _P + "/{name:path}/residency", Scope.PROMPTS_READ, prompts.get_residency, "prompts"),
    Route("GET", _P + "/{name:path}/shares", Scope.PROMPTS_READ, shares.list_shares, "prompts"),
    Route("PUT", _P + "/{name:path}/shares/{tenant}", Scope.PROMPTS_WRITE, shares.put_share, "prompts"),
    Route("DELETE", _P + "/{name:path}/shares/{tenant}", Scope.PROMPTS_WRITE, shares.delete_share, "prompts"),
    Route(
        "POST", _P + "/{name:path}/evaluate", Scope.INFER, evaluation.evaluate_prompt, "prompts", operation="evaluate"
    ),
    Route("POST", _P + "/{name:path}/rollback", Scope.PROMPTS_WRITE, prompts.roll_back, "prompts"),
    Route(
        "PUT",
        _P + "/{name:path}",
        Scope.PROMPTS_WRITE,
        prompts.put_prompt,
        "prompts",
        openapi.PUBLISHED,
        is_large=True,
        takes_file=True,
    ),
    Route("GET", _P + "/{name:path}", Scope.PROMPTS_READ, prompts.get_prompt, "prompts"),
    Route("DELETE", _P + "/{name:path}", Scope.PROMPTS_WRITE, prompts.delete_prompt, "prompts"),
    Route("POST", "/v1/files", Scope.TRAIN, files.create_file, "training", is_large=True),
    Route("GET", "/v1/files", Scope.TRAIN, files.list_files, "training"),
    Route("GET", "/v1/files/{file_id}", Scope.TRAIN, files.get_file, "training"),
    Route("GET", "/v1/files/{file_id}/content", Scope.TRAIN, files.get_file_content, "training", openapi.FILE),
    Route("DELETE", "/v1/files/{file_id}", Scope.TRAIN, files.delete_file, "training"),
    Route("GET", "/v1/fine_tuning/methods", Scope.TRAIN, fine_tuning.list_methods, "training"),
    Route("POST", _J, Scope.TRAIN, fine_tuning.create_job, "training", is_large=True),
    Route("GET", _J, Scope.TRAIN, fine_tuning.list_jobs, "training"),
    Route("GET", _J + "/{job_id}", Scope.TRAIN, fine_tuning.get_job, "training"),
    Route("DELETE", _J + "/{job_id}", Scope.TRAIN, fine_tuning.delete_job, "training"),
    Route("POST", _J + "/{job_id}/cancel", Scope.TRAIN, fine_tuning.cancel_job, "training"),
    Route("POST", _J + "/{job_id}/pause", Scope.TRAIN, fine_tuning.pause_job, "training"),
    Route("POST", _J + "/{job_id}/resume", Scope.TRAIN, fine_tuning.resume_job, "training"),
    Route("GET", _J + "/{job_id}/events", Scope.TRAIN, fine_tuning.list_events, "training", openapi.STREAM),
    Route("GET", _J + "/{job_id}/checkpoints", Scope.TRAIN, fine_tuning.list_checkpoints, "training"),
    Route(
        "POST",
        "/admin/training/jobs",
        Scope.ADMIN,
        training_jobs.create_jobs,
        "training",
        openapi.EACH,
        is_large=True,
    ),
    Route("POST", "/admin/keys", Scope.ADMIN, keys.create_key, "admin"),
    Route("GET", "/admin/keys", Scope.ADMIN, keys.list_keys, "admin"),
    Route("POST", "/admin/keys/{key_id}/rotate", Scope.ADMIN, keys.rotate_key, "admin"),
    Route("DELETE", "/admin/keys/{key_id}", Scope.ADMIN, keys.revoke_key, "admin"),
    Route("GET", "/admin/tenants", Scope.ADMIN, tenants.list_tenants, "admin"),
    Route("GET", "/admin/tenants/{tenant}", Scope.ADMIN, tenants.get_tenant, "admin"),
    Route("PATCH", "/admin/tenants/{tenant}", Scope.ADMIN, tenants.change_tenant, "admin"),
    Route("GET", "/admin/quarantine", Scope.ADMIN, quarantine.list_quarantined, "admin"),
    Route("DELETE", "/admin/quarantine/{tenant}/{version}", Scope.ADMIN, quarantine.release_prompt, "admin"),
    Route("DELETE", "/admin/tenants/{tenant}", Scope.ADMIN, erasing.erase_tenant, "admin"),
    Route("DELETE", "/v1/users/{user:path}", Scope.PROMPTS_WRITE, erasing.erase_user, "prompts", also=Scope.TRAIN),
    Route("GET", "/admin/audit", Scope.ADMIN, audit.list_audit, "admin"),
    Route("GET", "/admin/usage", Scope.ADMIN, tenants.all_usage, "admin"),
    Route("GET", "/v1/usage", Scope.INFER, tenants.own_usage, "usage"),
    Route("GET", "/admin/engine", Scope.ADMIN, health.engine_stats, "admin"),
    Route("POST", "/admin/drain", Scope.ADMIN, drain.start_drain, "admin"),
    Route("GET", "/admin/drain", Scope.ADMIN, drain.get_drain, "admin"),
    Route("DELETE", "/admin/drain", Scope.ADMIN, drain.end_drain, "admin"),
    Route("GET", "/admin/servers", Scope.ADMIN, health.list_servers, "admin"),
    Route("GET", "/livez", Scope.OPEN, health.livez, "health", openapi.PROBE),
    Route("GET", "/readyz", Scope.OPEN, health.readyz, "health", openapi.PROBE),
    Route("GET", "/startupz", Scope.OPEN, health.startupz, "health", openapi.PROBE),
    Route("GET", "/health", Scope.OPEN, health.livez, "health", openapi.PROBE),
    Route("GET", "/metrics", Scope.OPEN, health.metrics, "health", openapi.PLAIN),
    Route("GET", "/version", Scope.OPEN, health.version, "health"),
    Route("GET", "/", Scope.OPEN, console.to_console, "console", is_page=True),
    Route("GET", "/docs", Scope.OPEN, console.to_reference, "console", is_page=True),
    Route("GET", "/ui", Scope.OPEN, console.to_console, "console", is_page=True),
    Route("GET", "/ui/{path:path}", Scope.OPEN, console.get_asset, "console", is_page=True),
)


def add_routes(router: APIRouter, limits: Limits) -> None:
    """Register the table with the application's own router.

    Of a router that is included in another FastAPI makes all routes once more, when the first request comes: it would
    wait for some tenths of a second, and everybody with it.
    """
    for route in ROUTES:
        router.add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            response_model=None,
            response_class=Response,
            responses={**route.responses, **openapi.ERRORS},
            openapi_extra=openapi.UPLOAD if route.takes_file else None,
            tags=[route.tag],
            include_in_schema=not route.is_page,
            max_body_size=route.max_body_bytes(limits),
            route_class_override=guarded(route, limits),
        )
        if route.tag == "health" or route.is_page:  # balancers probe by HEAD too
            router.add_api_route(
                route.path,
                route.handler,
                methods=["HEAD"],
                include_in_schema=False,
                route_class_override=guarded(route, limits),
            )
