"""`/v1/files`: training data, uploaded once and named in jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Form, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from promptd.api.downloads import download
from promptd.api.schemas import User
from promptd.api.services import principal_of, services_of, visit_of
from promptd.api.spool import content_of
from promptd.jobs import FileRecord

PURPOSE = "fine-tune"
_MAX_LISTED = 10_000


def file_view(record: FileRecord) -> dict[str, Any]:
    """A file as the API shows it."""
    of_user = {} if record.user is None else {"user": record.user}
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": int(record.created_at),
        "filename": record.filename,
        "purpose": PURPOSE,
        "status": "processed",
        **of_user,
    }


class FileForm(BaseModel):
    """The parts of an upload."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile
    purpose: Literal["fine-tune"]
    user: User | None = None


async def create_file(form: Annotated[FileForm, Form(media_type="multipart/form-data")], request: Request) -> Response:
    """Upload JSON lines. Rows are checked when a job uses them; an error then names the line."""
    services = services_of(request)
    record = await services.files.create(
        principal_of(request).tenant, form.file.filename or "", content_of(form.file), user=form.user
    )
    return JSONResponse(file_view(record))


async def list_files(
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = _MAX_LISTED,
    purpose: Annotated[Literal["fine-tune"] | None, Query()] = None,
    order: Annotated[Literal["desc"], Query()] = "desc",
) -> Response:
    """List the caller's files, newest first."""
    found = await services_of(request).files.list(principal_of(request).tenant, after=after, limit=limit + 1)
    return JSONResponse(page(list(map(file_view, found)), limit))


async def get_file(file_id: str, request: Request) -> Response:
    """Read a file's description."""
    return JSONResponse(file_view(await services_of(request).files.get(principal_of(request).tenant, file_id)))


async def get_file_content(file_id: str, request: Request) -> Response:
    """Download a file as it was uploaded."""
    files, tenant = services_of(request).files, principal_of(request).tenant
    visit_of(request).hold_bytes((await files.get(tenant, file_id)).num_bytes)
    return download(await files.content(tenant, file_id), "application/octet-stream")


async def delete_file(file_id: str, request: Request, erase: bool = False) -> Response:
    """Delete a file. A running job has its rows already; one that still needs them fails and says so.

    With `erase` its bytes go now, and the answer tells what went.
    """
    services, tenant = services_of(request), principal_of(request).tenant
    deleted: dict[str, Any] = {"id": file_id, "object": "file", "deleted": True}
    if erase:
        deleted["erased"] = await services.eraser.file(tenant, file_id)
    else:
        await services.files.delete(tenant, file_id)
    return JSONResponse(deleted)


def page(views: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list, from up to one more entry than the page has."""
    shown = views[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(views) > limit,
    }
