"""`/v1/prompts`: upload, list, read, roll back, delete."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import zipfile
from collections.abc import Awaitable
from typing import Annotated, Any, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from promptd_store import (
    MAX_CHAIN_PROMPTS,
    PromptArtifact,
    PromptNameError,
    PromptNotFoundError,
    PromptRecord,
    PromptRef,
    parse_name,
    to_peft,
)
from promptd_store.passing_thread import compute

from promptd.api.auth import authorize
from promptd.api.call_notes import noting
from promptd.api.downloads import download
from promptd.api.schemas import PromptName, RollbackBody, User
from promptd.api.services import principal_of, services_of, visit_of
from promptd.api.text_prompts import text_prompt
from promptd.api.uploads import check_policy, is_text, read_upload, seal_headers
from promptd.engine.neighbors import neighbors
from promptd.engine.prompt_cache import PUBLIC_SALT
from promptd.errors import InvalidRequestError, PayloadTooLargeError
from promptd.modeling import FrozenModel
from promptd.tenancy import Claim, Scope, salt_of

_MAX_CONFIG_CHARS = 24 << 10
_MAX_LISTED = 100
_MAX_SHOWN_TEXT = 200
_MAX_ID_CHARS = 64 + 1 + 96  # tenant/name
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the archive's bytes depend on its content alone


def describe(record: PromptRecord, viewer: str, *, is_listed: bool = False) -> dict[str, Any]:
    """A record as the API shows it; its id names it in every route.

    In a list a text is shown by its beginning.
    """
    manifest = dict(record.manifest)
    text = manifest.get("text")
    if is_listed and text is not None and len(text) > _MAX_SHOWN_TEXT:
        manifest["text"] = text[:_MAX_SHOWN_TEXT] + "…"
    return {
        "id": record.name_for(viewer),
        "object": "prompt",
        "owned_by": record.tenant,
        "version": record.version,
        "number": record.number,
        "is_current": record.is_current,
        "kind": record.kind.value,
        "num_virtual_tokens": record.num_virtual_tokens,
        "num_bytes": record.num_bytes,
        "base_fingerprint": record.base_fingerprint,
        "verified": record.verified,
        "visibility": record.visibility,
        "behind": list(record.behind),
        "user": record.user if record.tenant == viewer else None,
        "created": record.created_at,
        "provenance": dict(record.provenance),
        "manifest": manifest,
    }


def _respond(record: PromptRecord, request: Request, status_code: int = 200) -> JSONResponse:
    shown = describe(record, principal_of(request).tenant)
    return JSONResponse(shown, status_code=status_code, headers={"ETag": f'"{record.etag}"'})


def _checked(name: str, artifact: PromptArtifact) -> dict[str, Any]:
    """What an upload would publish."""
    return {
        "id": name,
        "object": "prompt.check",
        "version": artifact.version,
        "kind": artifact.kind.value,
        "num_virtual_tokens": artifact.num_virtual_tokens,
        "num_bytes": len(artifact.content),
        "verified": artifact.verified,
        "manifest": artifact.manifest.to_dict(),
    }


async def put_prompt(
    name: str,
    request: Request,
    kind: Annotated[Literal["soft", "prefix", "text"] | None, Query()] = None,
    num_virtual_tokens: Annotated[int | None, Query(ge=1, le=1 << 20)] = None,
    visibility: Annotated[Literal["private", "public"], Query()] = "private",
    behind: Annotated[list[PromptName] | None, Query(max_length=MAX_CHAIN_PROMPTS - 1)] = None,
    user: Annotated[User | None, Query()] = None,
    dry_run: bool = False,
) -> Response:
    """Publish a version: the body is a safetensors file, native or from PEFT, or a plain text as JSON.

    A PEFT `adapter_config.json` may travel in the header `X-Promptd-Adapter-Config`, base64url-coded. `behind` names
    prompts that this one was learned behind: asking for it serves the whole chain. `user` is the end user whom it
    belongs to, see `DELETE /v1/users/{user}`.
    With `dry_run` every check of the file is made, the answer says what it holds, and nothing is stored.
    """
    services, principal = services_of(request), principal_of(request)
    if visibility == "public":
        authorize(principal, Scope.ADMIN)
    name = own_name(name, request)
    content = await read_upload(services, request)
    if is_text(request):
        longest = services.engine.engine.max_model_len
        content = await asyncio.to_thread(text_prompt, bytes(content), services.model, longest)
    given: dict[str, Any] = {
        "if_match": request.headers.get("if-match"),
        "if_none_match": request.headers.get("if-none-match"),
        "kind": kind,
        "num_virtual_tokens": num_virtual_tokens,
        "adapter_config": _adapter_config(request.headers.get("x-promptd-adapter-config")),
    }

    def examine(artifact: PromptArtifact) -> Awaitable[None]:
        check_policy(services, request, artifact)
        return services.vetting.examine(artifact, principal.tenant)

    if dry_run:
        artifact = await services.catalog.check(principal.tenant, name, content, **given)
        await examine(artifact)
        return JSONResponse(_checked(name, artifact))
    with noting(request) as note:
        record = await services.catalog.publish(
            principal.tenant,
            name,
            content,
            visibility=visibility,
            behind=behind or (),
            user=user,
            examine=examine,
            note=lambda record: note(_status(record)),
            **given,
        )
    return _respond(record, request, _status(record))


def _status(record: PromptRecord) -> int:
    return 201 if record.number == 1 else 200


async def list_prompts(
    request: Request,
    after: Annotated[str | None, Query(max_length=_MAX_ID_CHARS)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = _MAX_LISTED,
    search: Annotated[str | None, Query(max_length=_MAX_ID_CHARS)] = None,
) -> Response:
    """List the caller's prompts by name, then public and shared ones of others; `after` is the last id before.

    With `search` only those whose name has these characters, whatever their case.
    """
    tenant = principal_of(request).tenant
    passed = None if after is None else _cursor(after)
    catalog = services_of(request).catalog
    records, has_more = await catalog.page(tenant, limit=limit, after=passed, search=search or "")
    data = [describe(record, tenant, is_listed=True) for record in records]
    return JSONResponse({"object": "list", "data": data, "has_more": has_more})


async def get_prompt(name: str, request: Request) -> Response:
    """Read one prompt, `[owner/]name`; `name@2` and `name@sha256:…` name a version."""
    return _respond(await _resolve(name, request), request)


async def list_versions(name: str, request: Request) -> Response:
    """List every version of a prompt that the caller may see, newest first."""
    tenant = principal_of(request).tenant
    records = await services_of(request).catalog.versions(tenant, name)
    data = [describe(record, tenant, is_listed=True) for record in records]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


async def get_content(
    name: str, request: Request, format: Annotated[Literal["native", "peft"], Query()] = "native"
) -> Response:
    """Download: `native` is the file as stored; `peft` a zip of adapter_config.json and adapter_model.safetensors."""
    services = services_of(request)
    record = await _resolve(name, request)
    visit_of(request).hold_bytes(record.num_bytes if format == "native" else 3 * record.num_bytes)
    artifact = await services.catalog.load(record)
    headers = {"ETag": f'"{record.version}"', "X-Promptd-Version": record.version, **seal_headers(services, record)}
    if format == "native":
        return download(artifact.content, "application/octet-stream", headers)
    archive = await asyncio.to_thread(_peft_archive, artifact, services.model)
    return download(archive, "application/zip", headers)


def _peft_archive(artifact: PromptArtifact, model: FrozenModel) -> bytes:
    config, weights = to_peft(artifact, spec=model.spec, base_model_name_or_path=model.served_name)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for filename, data in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
            zipped.writestr(zipfile.ZipInfo(filename, _ZIP_TIME), data)
    return archive.getvalue()


async def roll_back(name: str, body: RollbackBody, request: Request) -> Response:
    """Point the name to an earlier version."""
    name, tenant = own_name(name, request), principal_of(request).tenant
    try:
        record = await services_of(request).catalog.rollback(
            tenant, name, body.to, if_match=request.headers.get("if-match")
        )
    except PromptNameError as error:
        raise InvalidRequestError(f"to: {error}", param="to", code=error.code) from error
    return _respond(record, request)


async def delete_prompt(name: str, request: Request, erase: bool = False) -> Response:
    """Delete a prompt with all its versions; with `erase` its bytes too, now, and tell what went."""
    services, tenant, given = services_of(request), principal_of(request).tenant, request.headers.get("if-match")
    deleted: dict[str, Any] = {"id": name, "object": "prompt.deleted", "deleted": True}
    if erase:
        deleted["erased"] = await services.eraser.prompt(tenant, own_name(name, request), if_match=given)
    else:
        await services.catalog.delete(tenant, own_name(name, request), if_match=given)
    return JSONResponse(deleted)


async def get_neighbors(name: str, request: Request, count: Annotated[int, Query(ge=1, le=20)] = 5) -> Response:
    """Show the vocabulary entries nearest to each virtual token of a soft prompt."""
    services = services_of(request)
    record = await _resolve(name, request)
    artifact = await services.catalog.load(record)
    visit_of(request).claim(Claim(is_inference=True))  # it takes of the processor what a request to the model takes
    async with services.neighbor_turns:
        found = await compute(neighbors, services.model, artifact, count)
    data = [
        {
            "index": index,
            "neighbors": [{"token_id": n.token_id, "token": n.token, "cosine": n.cosine} for n in row],
        }
        for index, row in enumerate(found)
    ]
    return JSONResponse({"object": "list", "version": record.version, "data": data})


async def get_residency(name: str, request: Request) -> Response:
    """Tell how many bytes of keys and values this server keeps of a prompt now; with 0 its next use makes them.

    What other tenants have of the same content under private names is theirs, and is not counted.
    """
    services = services_of(request)
    record = await _resolve(name, request)
    salts = [salt_of(principal_of(request).tenant)]
    if record.visibility == "public":
        salts.append(PUBLIC_SALT)
    num_bytes = await services.engine.resident_bytes(record.version, salts)
    return JSONResponse({"object": "prompt.residency", "version": record.version, "num_bytes": num_bytes})


async def _resolve(name: str, request: Request) -> PromptRecord:
    principal = principal_of(request)
    record = await services_of(request).catalog.resolve(principal.tenant, name)
    authorize(principal, Scope.PROMPTS_READ, record)
    return record


def own_name(name: str, request: Request) -> str:
    """Return the bare name of what the caller may change: another tenant's prompt looks like an absent one."""
    parsed = parse_name(name)
    if parsed.owner not in (None, principal_of(request).tenant):
        raise PromptNotFoundError(f"no prompt {name!r}", param="prompt")
    return parsed.name


def _cursor(after: str) -> PromptRef:
    try:
        return parse_name(after)
    except PromptNameError as error:
        raise InvalidRequestError(f"after: {error}", param="after") from error


def _adapter_config(header: str | None) -> bytes | None:
    if header is None:
        return None
    if len(header) > _MAX_CONFIG_CHARS:
        raise PayloadTooLargeError("adapter_config.json is larger than 16 KiB", param="x-promptd-adapter-config")
    try:
        return base64.b64decode(header.encode() + b"=" * (-len(header) % 4), b"-_", validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(
            f"X-Promptd-Adapter-Config is not base64url-coded: {error}", param="x-promptd-adapter-config"
        ) from error
