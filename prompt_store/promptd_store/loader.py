"""From a record to its artifact: blobs read and checked, decoded off the event loop, kept in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

from promptd_store.artifact import BaseModelSpec, PromptArtifact
from promptd_store.base import Store
from promptd_store.bounds import Bounds
from promptd_store.cache import ArtifactCache, CacheStats
from promptd_store.codec import decode
from promptd_store.errors import StoreError
from promptd_store.passing_thread import compute
from promptd_store.record import PromptRecord

ArtifactKey = tuple[str, str, str | None, str, str | None]
"""Tenant, digests of the file and of its PEFT configuration, version; the tenant that it is shared with."""


class ArtifactLoader:
    """Keeps artifacts apart by tenant: equal bytes of two tenants are two entries.

    So are those that one shares with others: no latency tells one of them that another has used it.
    """

    def __init__(self, store: Store, spec: BaseModelSpec, bounds: Bounds, cache_bytes: int) -> None:
        self._store = store
        self._spec = spec
        self._bounds = bounds
        self._cache = ArtifactCache(cache_bytes)

    @property
    def stats(self) -> CacheStats:
        """Counters of the cache."""
        return self._cache.stats

    async def load(self, record: PromptRecord) -> PromptArtifact:
        """Return the artifact of a record."""
        owner = record.granted_to or record.tenant
        return await self._cache.get(_key(record), lambda: self._read(record), owner=owner)

    def discard(self, records: Iterable[PromptRecord]) -> None:
        """Forget the artifacts of records, for all who see them."""
        gone = {_key(record)[:-1] for record in records}
        for key in self._keys:
            if key[:-1] in gone:
                self._cache.discard(key)

    def forget(self, tenant: str, versions: Collection[str] | None) -> int:
        """Forget a tenant's artifacts, or those of some versions; return how many."""
        gone = [key for key in self._keys if key[0] == tenant and (versions is None or key[3] in versions)]
        for key in gone:
            self._cache.discard(key)
        return len(gone)

    @property
    def _keys(self) -> list[ArtifactKey]:
        return cast(list[ArtifactKey], self._cache.keys)

    async def _read(self, record: PromptRecord) -> PromptArtifact:
        content = await self._store.get_blob(record.tenant, record.content_digest)
        config = None
        if record.adapter_config_digest is not None:
            config = await self._store.get_blob(record.tenant, record.adapter_config_digest)
        artifact = await compute(
            decode, content, self._spec, kind=record.kind, adapter_config=config, bounds=self._bounds
        )
        if artifact.version != record.version:
            raise StoreError(f"prompt {record.name!r} decodes to another version", code="version_mismatch")
        return artifact


def _key(record: PromptRecord) -> ArtifactKey:
    return record.tenant, record.content_digest, record.adapter_config_digest, record.version, record.granted_to
