"""Prompts by name: publish, resolve, load, roll back, delete. Each is one atomic step; made for one base model."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from promptd_store.artifact import BaseModelSpec, PromptArtifact
from promptd_store.base import Append, Check, Content, HasBlob, Lease, Store
from promptd_store.bounds import Bounds
from promptd_store.cache import CacheStats
from promptd_store.chains import check_front, exact_name, extend, in_front
from promptd_store.codec import decode
from promptd_store.draft import examined, write_draft
from promptd_store.errors import (
    BlobNotFoundError,
    CheckFailedError,
    LeaseLostError,
    LimitReachedError,
    PromptChainBrokenError,
    PromptModelMismatchError,
    PromptNameError,
    PromptNotFoundError,
    StoreUnavailableError,
)
from promptd_store.listing import PromptListing
from promptd_store.loader import ArtifactLoader
from promptd_store.manifest import PromptKind
from promptd_store.namebook import NameBook
from promptd_store.names import PromptRef
from promptd_store.naming_blobs import naming_blobs
from promptd_store.passing_thread import compute
from promptd_store.pointers import Pointers
from promptd_store.publication import check_publication
from promptd_store.record import PromptRecord, Visibility
from promptd_store.remembered import OUTAGE_SECONDS, RememberedNames
from promptd_store.sharing import PromptShares
from promptd_store.users import raise_if_erased, user_checks
from promptd_store.visible import VisiblePrompts

Records = list[PromptRecord]  # `list` is a method of the catalog
Examine = Callable[[PromptArtifact], Awaitable[None]]
"""Raises what speaks against publishing an artifact: when it is called, before a byte is written, or when awaited."""


class PromptCatalog:
    """The product's operations. The tenant is always given; absent and foreign prompts look the same."""

    def __init__(
        self,
        store: Store,
        spec: BaseModelSpec,
        cache_bytes: int = 256 << 20,
        *,
        bounds: Bounds | None = None,
        reserved_names: Collection[str] = (),
        outage_seconds: float = OUTAGE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.spec = spec
        self._bounds = bounds or Bounds()
        self._reserved_names = frozenset(reserved_names)
        self._clock = clock
        self._names = NameBook(store)
        self._visible = VisiblePrompts(self._names, spec)
        self._pointers = Pointers(self._names, self._visible, spec, clock)
        self._listing = PromptListing(self._names, spec)
        self._remembered = RememberedNames(outage_seconds)
        self.shares = PromptShares(self._names)
        """With whom prompts are shared."""
        self._loader = ArtifactLoader(store, spec, self._bounds, cache_bytes)

    @property
    def cache_stats(self) -> CacheStats:
        """Counters of the host-side artifact cache."""
        return self._loader.stats

    async def publish(
        self,
        tenant: str,
        name: str,
        content: Content,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        kind: PromptKind | str | None = None,
        num_virtual_tokens: int | None = None,
        adapter_config: Mapping[str, Any] | bytes | None = None,
        provenance: Mapping[str, Any] | None = None,
        visibility: Visibility = "private",
        sidecar: bytes | None = None,
        behind: Collection[str] = (),
        user: str | None = None,
        checks: Collection[Check | Lease] = (),
        examine: Examine | None = None,
        note: Callable[[PromptRecord], Append] | None = None,
    ) -> PromptRecord:
        """Check, store and point the name to it; durable on return.

        Publishing again what the name points to changes nothing. `checks` join the atomic step: a training job's
        lease fences its publication. The sidecar keeps the parameters before folding. `behind` names prompts that
        this one is always served behind, from the chain's beginning. `examine` has the last word on the artifact.
        `note` tells what is to be written down of the publication, in its very step.
        Raises `LimitReachedError` over a quota.
        """
        plain = check_publication(tenant, name, self._reserved_names, visibility, provenance)
        all_checks = [*checks, *await user_checks(self.store, tenant, user)]
        front = await self._front(tenant, behind, visibility)
        before = (await self._names.read(tenant, name)).state
        self._pointers.check(before, if_match, if_none_match)
        artifact = await self._decoded(content, kind, num_virtual_tokens, adapter_config)  # before a byte is written
        write = partial(
            write_draft,
            self.store,
            self.spec,
            before,
            artifact,
            tenant=tenant,
            name=name,
            provenance=plain,
            visibility=visibility,
            sidecar=sidecar,
            behind=tuple(map(exact_name, front)),
            user=user,
            created_at=int(self._clock()),
        )
        draft = await (write() if examine is None else examined(self.store, examine(artifact), write))

        async def move(needs: Sequence[HasBlob]) -> PromptRecord:
            return await self._pointers.to_draft(draft, if_match, if_none_match, [*all_checks, *needs], note)

        try:
            return await naming_blobs(self.store, tenant, draft.blobs, move)
        except (CheckFailedError, LeaseLostError, LimitReachedError) as error:
            await draft.drop(self.store)  # it comes too late, perhaps for someone erased
            if isinstance(error, CheckFailedError):
                raise_if_erased(error, tenant, user)
            raise

    async def check(
        self,
        tenant: str,
        name: str,
        content: Content,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        kind: PromptKind | str | None = None,
        num_virtual_tokens: int | None = None,
        adapter_config: Mapping[str, Any] | bytes | None = None,
    ) -> PromptArtifact:
        """Check an upload as `publish` does, and store nothing."""
        check_publication(tenant, name, self._reserved_names, "private", None)
        self._pointers.check((await self._names.read(tenant, name)).state, if_match, if_none_match)
        return await self._decoded(content, kind, num_virtual_tokens, adapter_config)

    async def resolve(self, tenant: str, ref: str) -> PromptRecord:
        """Find `[owner/]name[@N|@sha256:…]`: the tenant's own, then the public one; a shared one by its owner alone.

        While the store is away: what it last said, for a while, where `follow_changes` runs.
        """
        num_changes = self._remembered.num_changes
        try:
            record = await self._visible.resolve(tenant, ref)
        except StoreUnavailableError:
            remembered = self._remembered.recall(tenant, ref)
            if remembered is None:
                raise
            return remembered
        self._remembered.keep(tenant, ref, record, num_changes)
        return record

    async def follow_changes(self) -> None:
        """Keep what is remembered of names true, until cancelled."""
        await self._remembered.follow(self.store)

    async def in_front(self, tenant: str, record: PromptRecord) -> Records:
        """Return what a prompt stands behind, as this tenant may see it. Raises `PromptChainBrokenError`."""
        return await in_front(lambda name: self.resolve(tenant, name), record)

    async def chain(self, tenant: str, refs: Iterable[str]) -> Records:
        """Return the chain that names mean, each with all that it stands behind in front of it."""
        chain: Records = []
        for ref in refs:
            record = await self.resolve(tenant, ref)
            extend(chain, await self.in_front(tenant, record), record)
        return chain

    async def load(self, record: PromptRecord) -> PromptArtifact:
        """Return the artifact of a record, from memory where possible; concurrent loads of one are one."""
        self._visible.check_base(record)
        try:
            return await self._loader.load(record)
        except BlobNotFoundError:
            if await self._names.version(record.tenant, record.name, record.number) is not None:
                raise  # the record stands, its bytes are lost
            raise PromptNotFoundError(f"no prompt {record.name!r}", param="prompt") from None  # deleted meanwhile

    async def load_sidecar(self, record: PromptRecord) -> bytes | None:
        """Return what was published beside the artifact."""
        if record.sidecar_digest is None:
            return None
        return await self.store.get_blob(record.tenant, record.sidecar_digest)

    async def list(self, tenant: str, *, include_public: bool = False) -> Records:
        """Return what the tenant's names point to, by name; then public and shared ones of others, where asked for."""
        records, _ = await self._listing.page(tenant, include_others=include_public)
        return records

    async def page(
        self, tenant: str, *, limit: int, after: PromptRef | None = None, search: str = ""
    ) -> tuple[Records, bool]:
        """Return a part of `list`, others' included, and whether there is more behind it; see `PromptListing.page`."""
        return await self._listing.page(tenant, limit=limit, after=after, search=search)

    async def versions(self, tenant: str, ref: str) -> Records:
        """Return the versions of `[owner/]name` that the tenant may see, newest first."""
        return await self._visible.versions(tenant, ref)

    async def rollback(self, tenant: str, name: str, to: int | str, *, if_match: str | None = None) -> PromptRecord:
        """Point the name to an earlier version, `3` or `sha256:…`, of this base model."""
        return await self._pointers.back(tenant, name, to, if_match)

    async def delete(self, tenant: str, name: str, *, if_match: str | None = None) -> Records:
        """Delete a name with all its versions, for every base model; return them. Its numbers are never given again."""
        records = await self._pointers.to_nothing(tenant, name, if_match)
        self._loader.discard(records)
        return records

    def forget(self, tenant: str, versions: Collection[str] | None = None) -> int:
        """Drop what this process has in memory of a tenant's prompts, or of some versions; return how many files."""
        self._remembered.forget_tenant(tenant)
        return self._loader.forget(tenant, versions)

    async def _decoded(
        self,
        content: Content,
        kind: PromptKind | str | None,
        num_virtual_tokens: int | None,
        adapter_config: Mapping[str, Any] | bytes | None,
    ) -> PromptArtifact:
        return await compute(
            decode,
            content,
            self.spec,
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            adapter_config=adapter_config,
            bounds=self._bounds,
        )

    async def _front(self, tenant: str, behind: Collection[str], visibility: Visibility) -> Records:
        try:
            front = await self.chain(tenant, behind)
        except (PromptNotFoundError, PromptNameError, PromptModelMismatchError, PromptChainBrokenError) as error:
            error.param = "behind"
            raise
        check_front(front, visibility)
        return front
