"""Requests of admins, written once for both clients. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promptd_client._job_requests import path_of
from promptd_client._replies import reader
from promptd_client._requests import Call, body_of
from promptd_client.admin_models import ApiKey, IssuedKey

KEYS = "/admin/keys"


def create_key(
    tenant: str, scopes: Sequence[str] | None, expires_in_seconds: float | None, label: str | None
) -> Call[IssuedKey]:
    """Issue a key. A second one would be another key, so it is not repeated unasked."""
    options: dict[str, Any] = {
        "scopes": None if scopes is None else list(scopes),
        "expires_in_seconds": expires_in_seconds,
        "label": label,
    }
    return Call("POST", KEYS, reader(IssuedKey), body=body_of({"tenant": tenant}, options), is_idempotent=False)


def list_keys(tenant: str | None) -> Call[list[ApiKey]]:
    """List keys, of one tenant or of all."""
    return Call("GET", KEYS, reader(list[ApiKey], "data"), params={} if tenant is None else {"tenant": tenant})


def rotate_key(key_id: str, grace_seconds: float | None) -> Call[IssuedKey]:
    """Issue a successor."""
    body = body_of({}, {"grace_seconds": grace_seconds})
    return Call("POST", path_of(KEYS, key_id, "rotate"), reader(IssuedKey), body=body, is_idempotent=False)


def revoke_key(key_id: str) -> Call[ApiKey]:
    """End a key; twice is as good as once."""
    return Call("DELETE", path_of(KEYS, key_id), reader(ApiKey))
