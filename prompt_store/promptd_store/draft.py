"""A version before its name points to it: its blobs are stored, its record lacks number and etag."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from promptd_store.artifact import BaseModelSpec, PromptArtifact
from promptd_store.base import Content, Store
from promptd_store.errors import StoreError
from promptd_store.garbage import drop_unnamed
from promptd_store.holdings import PROMPTS, STORED_BYTES, check_room
from promptd_store.manifest import PromptKind
from promptd_store.record import PromptName, PromptRecord, Visibility
from promptd_store.strict_json import canonical_json


@dataclass(frozen=True, slots=True)
class Draft:
    """Where the name is not moved to it, it is dropped."""

    record: PromptRecord
    blobs: Mapping[str, Content]
    """By their digests."""

    async def drop(self, store: Store) -> None:
        """Delete at once what nothing else names."""
        await drop_unnamed(store, self.record.tenant, self.record.digests)


async def examined(store: Store, examining: Awaitable[None], write: Callable[[], Coroutine[Any, Any, Draft]]) -> Draft:
    """Write a draft while its artifact is examined: the disk is waited for meanwhile. A refused one is dropped."""
    task = asyncio.create_task(write())
    try:
        await examining
    except BaseException:
        with suppress(StoreError):  # why it is refused says more; what is left of it is garbage, and goes with that
            await (await task).drop(store)
        raise
    return await task


async def write_draft(
    store: Store,
    spec: BaseModelSpec,
    state: PromptName,
    artifact: PromptArtifact,
    *,
    tenant: str,
    name: str,
    provenance: Mapping[str, Any],
    visibility: Visibility,
    sidecar: bytes | None,
    behind: tuple[str, ...],
    user: str | None,
    created_at: int,
) -> Draft:
    """Store the blobs of what a name, which is in this state, is to point to. Raises `LimitReachedError`."""
    config = artifact.adapter_config
    base = artifact.manifest.base_fingerprint
    manifest = artifact.manifest.to_dict()
    size = len(artifact.content) + len(config or b"") + len(sidecar or b"")
    size += len(canonical_json([manifest, provenance]))
    current = state.current_for(spec.fingerprint)
    if current is None or current.version != artifact.version:  # else it may be what is there already
        await check_room(store, tenant, {PROMPTS: int(not state.current), STORED_BYTES: size})
    data = [artifact.content, *(one for one in (config, sidecar) if one is not None)]
    digests = [await store.put_blob(tenant, one) for one in data]
    record = PromptRecord(
        tenant=tenant,
        name=name,
        version=artifact.version,
        number=0,
        kind=artifact.kind,
        num_virtual_tokens=artifact.num_virtual_tokens,
        num_bytes=len(artifact.content),
        base_fingerprint=base if artifact.kind is PromptKind.TEXT else spec.fingerprint,
        created_at=created_at,
        etag="",
        provenance=provenance,
        visibility=visibility,
        verified=artifact.verified,
        manifest=manifest,
        content_digest=digests[0],
        adapter_config_digest=None if config is None else digests[1],
        sidecar_digest=None if sidecar is None else digests[-1],
        behind=behind,
        user=user,
        stored_bytes=size,
    )
    return Draft(record, dict(zip(digests, data, strict=True)))
