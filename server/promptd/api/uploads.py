"""The body of an uploaded prompt: how large it may be, whose it may be, and its bytes."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request
from promptd_store import Content, PromptArtifact, PromptKind, PromptRecord, largest_file
from starlette.datastructures import UploadFile

from promptd.api.services import Services
from promptd.api.spool import content_of, open_spool, spooling
from promptd.errors import InvalidArtifactError, InvalidRequestError, PayloadTooLargeError, PermissionDeniedError

TRAINED_HERE = "x-promptd-trained-here"
"""Answers carry it with a prompt that was trained here; an upload shows it again."""


def is_text(request: Request) -> bool:
    """Whether the body is a text prompt, as JSON."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def max_virtual_tokens(services: Services) -> int:
    """Return the virtual tokens that an uploaded prompt may have."""
    return min(services.limits.max_prefix_tokens, services.engine.engine.max_model_len)


def largest_upload(services: Services, request: Request) -> int:
    """Return the bytes that a body may have, by its kind as the headers and the query tell it."""
    if is_text(request):
        return services.limits.max_body_bytes
    told = request.query_params.get("kind")
    kind = PromptKind(told) if told in set(PromptKind) else None
    if kind is PromptKind.TEXT:
        return services.limits.max_body_bytes
    return largest_file(services.model.spec, kind, max_virtual_tokens(services))


def told_length(request: Request) -> int | None:
    """Return the length of the body as the headers tell it; None where they tell none."""
    told = request.headers.get("content-length", "")
    if not (told.isascii() and told.isdigit()):
        return None
    return int(told) if len(told) < 20 else 1 << 63  # more than any body has


async def read_upload(services: Services, request: Request) -> Content:
    """Read the body, stopping at the limit, whatever Content-Length claims; a large one waits on the disk."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequestError("uploads take no Content-Encoding", param="content-encoding")
    limit = largest_upload(services, request)
    if (told_length(request) or 0) > limit:
        raise _too_large(limit)
    upload = UploadFile(open_spool(services.limits.spool_folder), size=0)
    try:
        async for chunk in request.stream():
            if (upload.size or 0) + len(chunk) > limit:
                raise _too_large(limit)
            with spooling():
                await upload.write(chunk)
        return content_of(upload)
    finally:
        await upload.close()


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the file is larger than {limit} bytes, the most of its kind here", param="body")


def check_policy(services: Services, request: Request, artifact: PromptArtifact) -> None:
    """Raise `PermissionDeniedError` for a learned prompt that this server's operator does not take."""
    if artifact.kind is PromptKind.TEXT:  # nothing that a request could not say itself
        return
    if artifact.num_virtual_tokens > max_virtual_tokens(services):
        raise InvalidArtifactError(
            f"the prompt has {artifact.num_virtual_tokens} virtual tokens, this server takes "
            f"{max_virtual_tokens(services)}",
            param="num_virtual_tokens",
            code="num_virtual_tokens_out_of_range",
        )
    policy = services.limits.uploads
    if policy == "any":
        return
    if policy == "none":
        raise PermissionDeniedError("this server takes no uploads of learned prompts", code="uploads_off")
    if not hmac.compare_digest(request.headers.get(TRAINED_HERE, "").encode(), _seal(services, artifact.version)):
        raise PermissionDeniedError(
            f"this server takes only prompts that it trained itself: send the {TRAINED_HERE} that their content "
            "came with",
            code="not_trained_here",
        )


def seal_headers(services: Services, record: PromptRecord) -> dict[str, str]:
    """Return what proves, with the content of a prompt that was trained here, that it was."""
    if "job" not in record.provenance:  # which only training writes
        return {}
    return {TRAINED_HERE: _seal(services, record.version).decode()}


def _seal(services: Services, version: str) -> bytes:
    """HMAC of the version under a key of this purpose alone."""
    key = hmac.digest(services.keys.key_secret, b"promptd: trained here", hashlib.sha256)
    return hmac.digest(key, version.encode(), hashlib.sha256).hex().encode()
