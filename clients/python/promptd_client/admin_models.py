"""What the server answers to admins."""

from __future__ import annotations

from typing import Literal

from promptd_client.models import Reply


class ApiKey(Reply):
    """An API key as it is listed; times are seconds since 1970."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    label: str = ""
    state: Literal["active", "expired", "revoked"]
    created: int
    expires: int | None = None
    revoked: int | None = None


class IssuedKey(ApiKey):
    """A new key: `key` is in the clear and never shown again."""

    key: str
