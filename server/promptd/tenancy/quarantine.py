"""Keeps versions of prompts from being served, on every server within a second, until an operator lifts it."""

from __future__ import annotations

from dataclasses import replace

from promptd.errors import NotFoundError
from promptd.tenancy.book import Deed
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.tenant import QuarantinedPrompt, Tenant

MAX_QUARANTINED = 256
"""Of one tenant; then the oldest is let go: it is found out again as soon as it is asked for."""


async def quarantine(directory: TenantDirectory, tenant: str, prompt: str, version: str, *, by: str) -> None:
    """Serve a version of a tenant's prompt no more; the same again changes nothing."""

    def step(before: Tenant) -> tuple[Tenant, Deed] | None:
        if before.is_quarantined(version):
            return None
        new = QuarantinedPrompt(version, prompt, directory.book.clock())
        kept = (*before.quarantined, new)[-MAX_QUARANTINED:]
        deed = Deed("prompt.quarantined", {"prompt": prompt, "version": version})
        return replace(before, quarantined=kept), deed

    await directory.change(tenant, by, step)


async def lift(directory: TenantDirectory, tenant: str, version: str, *, by: str) -> None:
    """Serve a version again; raises `NotFoundError` where it is served anyway."""

    def step(before: Tenant) -> tuple[Tenant, Deed]:
        if not before.is_quarantined(version):
            raise NotFoundError(f"no version {version!r} of tenant {tenant!r} is quarantined", param="version")
        kept = tuple(one for one in before.quarantined if one.version != version)
        return replace(before, quarantined=kept), Deed("prompt.released", {"version": version})

    await directory.change(tenant, by, step)
