"""`/ui` and `/docs`: the console's files, under a policy that lets them talk to this server alone."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import RedirectResponse

from promptd.errors import RouteNotFoundError
from promptd.ui import START_PAGE, assets

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept, but asked about every time: a new server never runs beside an old page.
    "Cache-Control": "no-cache",
}


async def to_console() -> Response:
    """Lead a browser to the console; the address is relative, so that a path in front of it stays."""
    return RedirectResponse("ui/")


async def to_reference() -> Response:
    """Lead a browser to the page of the console that shows the API."""
    return RedirectResponse("ui/#/reference")


async def get_asset(path: str, request: Request) -> Response:
    """Send one file, or 304 where the browser has it."""
    asset = assets().get(path or START_PAGE)
    if asset is None:
        raise RouteNotFoundError(f"no route {request.method} {request.url.path}")
    headers = {**HEADERS, "ETag": asset.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if asset.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)
