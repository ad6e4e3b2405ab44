"""API keys, for asyncio. `Keys` is the same for ordinary code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from promptd_client import _admin_requests
from promptd_client.admin_models import ApiKey, IssuedKey

if TYPE_CHECKING:
    from promptd_client._async_client import AsyncClient

KeyList = list[ApiKey]  # `list` is a method


class AsyncKeys:
    """API keys, `client.keys`; needs an admin's key."""

    def __init__(self, client: AsyncClient) -> None:
        self._run = client.run

    async def create(
        self,
        tenant: str,
        *,
        scopes: Sequence[str] | None = None,
        expires_in_seconds: float | None = None,
        label: str | None = None,
    ) -> IssuedKey:
        """Issue a key; its text is in the answer and nowhere else. Without scopes: all but `admin`."""
        return await self._run(_admin_requests.create_key(tenant, scopes, expires_in_seconds, label))

    async def list(self, tenant: str | None = None) -> KeyList:
        """List the keys of one tenant, or of all."""
        return await self._run(_admin_requests.list_keys(tenant))

    async def rotate(self, key_id: str, *, grace_seconds: float | None = None) -> IssuedKey:
        """Issue a successor with the same scopes; the old key works on for the time of grace (a day)."""
        return await self._run(_admin_requests.rotate_key(key_id, grace_seconds))

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key, everywhere within a second."""
        return await self._run(_admin_requests.revoke_key(key_id))
