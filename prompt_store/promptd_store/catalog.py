"""Prompts by name: publish, resolve, load, roll back, delete. Each is one atomic step; made for one base model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from promptd_store.artifact import BaseModelSpec, PromptArtifact
from promptd_store.base import Check, Lease, Put, Store
from promptd_store.bounds import Bounds
from promptd_store.cache import CacheStats
from promptd_store.chains import check_front, exact_name, extend, in_front
from promptd_store.codec import decode
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
from promptd_store.garbage import drop_unnamed
from promptd_store.holdings import PROMPTS, STORED_BYTES, check_room
from promptd_store.loader import ArtifactLoader
from promptd_store.manifest import PromptKind
from promptd_store.namebook import NameBook, StoredName
from promptd_store.names import (
    PUBLIC_TENANT,
    PromptRef,
    check_name,
    check_tenant,
    digest_key,
    parse_name,
    parse_pin,
    parse_ref,
    version_key,
)
from promptd_store.passing_thread import compute
from promptd_store.preconditions import check_preconditions
from promptd_store.publication import check_publication, is_same_publication
from promptd_store.record import ANY_BASE, PromptName, PromptRecord, Visibility
from promptd_store.remembered import OUTAGE_SECONDS, RememberedNames
from promptd_store.sharing import PromptShares
from promptd_store.strict_json import canonical_json
from promptd_store.users import raise_if_erased, user_checks

Records = list[PromptRecord]  # `list` is a method of the catalog
Examine = Callable[[PromptArtifact], Awaitable[None]]
"""Raises what speaks against publishing an artifact."""
MAX_READS = 20
"""How often a read is repeated whose name moved between its two look-ups."""


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
        content: bytes,
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
    ) -> PromptRecord:
        """Check, store and point the name to it; durable on return.

        Publishing again what the name points to changes nothing. `checks` join the atomic step: a training job's
        lease fences its publication. The sidecar keeps the parameters before folding. `behind` names prompts that
        this one is always served behind, from the chain's beginning. `examine` has the last word on the artifact.
        Raises `LimitReachedError` over a quota.
        """
        plain = check_publication(tenant, name, self._reserved_names, visibility, provenance)
        all_checks = [*checks, *await user_checks(self.store, tenant, user)]
        front = await self._front(tenant, behind, visibility)
        artifact = await self.check(  # before a byte is written
            tenant,
            name,
            content,
            if_match=if_match,
            if_none_match=if_none_match,
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            adapter_config=adapter_config,
        )
        if examine is not None:
            await examine(artifact)
        draft, blobs = await self._draft(tenant, name, artifact, plain, visibility, sidecar)
        draft = replace(draft, behind=tuple(map(exact_name, front)), user=user)
        base = draft.base_fingerprint or ANY_BASE

        async def step(stored: StoredName) -> PromptRecord:
            current = stored.state.current_for(self.spec.fingerprint)
            self._check_preconditions(stored.state, if_match, if_none_match)
            if current is not None:
                present = await self._names.version(tenant, name, current.number)
                if present is not None and is_same_publication(present, draft):
                    return current.applied_to(present)
            number = stored.state.next_number
            moved = stored.state.moved(base, number, draft.version, visibility)
            record = replace(draft, number=number, etag=moved.current[base].etag)
            puts = [
                Put(version_key(tenant, name, number), record.to_bytes()),
                Put(digest_key(tenant, name, record.version), str(number).encode()),
            ]
            event = self._event("prompt.published", record)
            size = record.held_bytes
            await self._names.move(stored, moved, event, puts=puts, checks=all_checks, num_bytes=size)
            return record

        try:
            record = await self._names.retry(tenant, name, step)
        except (CheckFailedError, LeaseLostError, LimitReachedError) as error:
            await drop_unnamed(self.store, tenant, draft.digests)  # it comes too late, perhaps for someone erased
            if isinstance(error, CheckFailedError):
                raise_if_erased(error, tenant, user)
            raise
        for digest, data in blobs.items():  # what was erased meanwhile may have been the same bytes
            if not await self.store.has_blob(tenant, digest):
                await self.store.put_blob(tenant, data)
        return record

    async def check(
        self,
        tenant: str,
        name: str,
        content: bytes,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        kind: PromptKind | str | None = None,
        num_virtual_tokens: int | None = None,
        adapter_config: Mapping[str, Any] | bytes | None = None,
    ) -> PromptArtifact:
        """Check an upload as `publish` does, and store nothing."""
        check_publication(tenant, name, self._reserved_names, "private", None)
        self._check_preconditions((await self._names.read(tenant, name)).state, if_match, if_none_match)
        return await compute(
            decode,
            content,
            self.spec,
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            adapter_config=adapter_config,
            bounds=self._bounds,
        )

    async def resolve(self, tenant: str, ref: str) -> PromptRecord:
        """Find `[owner/]name[@N|@sha256:…]`: the tenant's own, then the public one; a shared one by its owner alone.

        While the store is away: what it last said, for a while, where `follow_changes` runs.
        """
        num_changes = self._remembered.num_changes
        try:
            record = await self._resolve(tenant, ref)
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

    async def _resolve(self, tenant: str, ref: str) -> PromptRecord:
        parsed = parse_ref(ref)
        async for owner in self._owners(check_tenant(tenant), parsed):
            found = await self._find(owner, parsed.name, parsed.number, parsed.version, viewer=tenant)
            if found is not None:
                return found
        raise PromptNotFoundError(f"no prompt {ref!r}", param="prompt")

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
        self._check_base(record.base_fingerprint, record.name)
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

    async def list(self, tenant: str, *, include_public: bool = False, all_bases: bool = False) -> Records:
        """Return what the tenant's names point to, by name; then public and shared ones of others, where asked for."""
        found = await self._names.names(check_tenant(tenant))
        if include_public:
            others = {*await self._names.public_names(), *await self._names.granted_names(tenant)}
            by_name = sorted((name, owner) for owner, name in others if owner != tenant)
            found += [await self._names.read(owner, name) for name, owner in by_name]
        records: Records = []
        for stored in found:
            usable = stored.state.current_for(self.spec.fingerprint)
            for current in stored.state.current.values() if all_bases else [usable] if usable else []:
                record = await self._names.version(stored.tenant, stored.name, current.number)
                seen = None if record is None else _as_seen(tenant, stored.state, record)
                if seen is not None:
                    records.append(current.applied_to(seen))
        return records

    async def versions(self, tenant: str, ref: str) -> Records:
        """Return the versions of `[owner/]name` that the tenant may see, newest first."""
        parsed = parse_name(ref)
        async for owner in self._owners(check_tenant(tenant), parsed):
            state = (await self._names.read(owner, parsed.name)).state
            records = await self._names.versions(owner, parsed.name) if _may_see_name(tenant, owner, state) else []
            visible = [_as_seen(tenant, state, record) for record in reversed(records)]
            seen = [state.applied_to(record, self.spec.fingerprint) for record in visible if record is not None]
            if seen:
                return seen
        raise PromptNotFoundError(f"no prompt {ref!r}", param="prompt")

    async def rollback(self, tenant: str, name: str, to: int | str, *, if_match: str | None = None) -> PromptRecord:
        """Point the name to an earlier version, `3` or `sha256:…`, of this base model."""
        number, version = parse_pin(str(to))
        _check_owned(tenant, name)

        async def step(stored: StoredName) -> PromptRecord:
            record = await self._find(tenant, name, number, version, viewer=tenant)
            current = stored.state.current_for(self.spec.fingerprint)
            if record is None:
                raise PromptNotFoundError(f"no prompt '{name}@{to}'", param="prompt")
            self._check_preconditions(stored.state, if_match)
            if current is not None and current.number == record.number:
                return current.applied_to(record)
            base = record.base_fingerprint or ANY_BASE
            moved = stored.state.moved(base, record.number, record.version, record.visibility)
            await self._names.move(stored, moved, self._event("prompt.rolled_back", record))
            return moved.current[base].applied_to(record)

        return await self._names.retry(tenant, name, step)

    async def delete(self, tenant: str, name: str, *, if_match: str | None = None) -> Records:
        """Delete a name with all its versions, for every base model; return them. Its numbers are never given again."""
        _check_owned(tenant, name)

        async def step(stored: StoredName) -> Records:
            if not stored.state.current:
                raise PromptNotFoundError(f"no prompt {name!r}", param="prompt")
            self._check_preconditions(stored.state, if_match)
            records = await self._names.versions(tenant, name)
            await self._names.remove(stored, records, self._event("prompt.deleted", records[-1]))
            for record in records:
                self._loader.discard(record)
            return records

        return await self._names.retry(tenant, name, step)

    def forget(self, tenant: str, versions: Collection[str] | None = None) -> int:
        """Drop what this process has in memory of a tenant's prompts, or of some versions; return how many files."""
        self._remembered.forget_tenant(tenant)
        return self._loader.forget(tenant, versions)

    async def _front(self, tenant: str, behind: Collection[str], visibility: Visibility) -> Records:
        try:
            front = await self.chain(tenant, behind)
        except (PromptNotFoundError, PromptNameError, PromptModelMismatchError, PromptChainBrokenError) as error:
            error.param = "behind"
            raise
        check_front(front, visibility)
        return front

    async def _draft(
        self,
        tenant: str,
        name: str,
        artifact: PromptArtifact,
        provenance: Mapping[str, Any],
        visibility: Visibility,
        sidecar: bytes | None,
    ) -> tuple[PromptRecord, dict[str, bytes]]:
        """Store the blobs and return them; the record that names them still lacks its number and etag."""
        config = artifact.adapter_config
        base = artifact.manifest.base_fingerprint
        manifest = artifact.manifest.to_dict()
        size = len(artifact.content) + len(config or b"") + len(sidecar or b"")
        size += len(canonical_json([manifest, provenance]))
        state = (await self._names.read(tenant, name)).state
        current = state.current_for(self.spec.fingerprint)
        if current is None or current.version != artifact.version:  # else it may be what is there already
            await check_room(self.store, tenant, PROMPTS, int(not state.current))
            await check_room(self.store, tenant, STORED_BYTES, size)
        data = [artifact.content, *(one for one in (config, sidecar) if one is not None)]
        digests = [await self.store.put_blob(tenant, one) for one in data]
        record = PromptRecord(
            tenant=tenant,
            name=name,
            version=artifact.version,
            number=0,
            kind=artifact.kind,
            num_virtual_tokens=artifact.num_virtual_tokens,
            num_bytes=len(artifact.content),
            base_fingerprint=base if artifact.kind is PromptKind.TEXT else self.spec.fingerprint,
            created_at=int(self._clock()),
            etag="",
            provenance=provenance,
            visibility=visibility,
            verified=artifact.verified,
            manifest=manifest,
            content_digest=digests[0],
            adapter_config_digest=None if config is None else digests[1],
            sidecar_digest=None if sidecar is None else digests[-1],
            stored_bytes=size,
        )
        return record, dict(zip(digests, data, strict=True))

    async def _owners(self, tenant: str, parsed: PromptRef) -> AsyncIterator[str]:
        """Yield whose name a reference may mean: the tenant's own first, then the named owner's or the public one."""
        if parsed.owner in (None, tenant):
            yield tenant
        owner = parsed.owner
        if owner in (None, PUBLIC_TENANT):
            owner = await self._names.public_owner(parsed.name)
        if owner is not None and owner != tenant:
            yield owner

    async def _find(
        self, owner: str, name: str, number: int | None, version: str | None, *, viewer: str
    ) -> PromptRecord | None:
        """Read one version of an owner's name as a viewer may see it; None is the same for absent and foreign."""
        for _ in range(MAX_READS):
            state = (await self._names.read(owner, name)).state
            if not _may_see_name(viewer, owner, state):
                return None
            current = state.current_for(self.spec.fingerprint)
            chosen = number
            if version is not None:
                chosen = await self._names.number_of(owner, name, version)
            elif number is None:
                if current is None:
                    raise self._mismatch(name)
                chosen = current.number
            if chosen is None:
                return None
            record = await self._names.version(owner, name, chosen)
            if record is None and number is None and version is None:
                continue  # deleted between the two reads: look again
            record = None if record is None else _as_seen(viewer, state, record)
            if record is None:
                return None
            self._check_base(record.base_fingerprint, name)
            return current.applied_to(record) if current else replace(record, is_current=False)
        return None

    def _check_preconditions(self, state: PromptName, if_match: str | None, if_none_match: str | None = None) -> None:
        current = state.current_for(self.spec.fingerprint)
        check_preconditions(current.etag if current else None, if_match, if_none_match)

    def _check_base(self, fingerprint: str | None, name: str) -> None:
        if fingerprint not in (None, self.spec.fingerprint):
            raise self._mismatch(name)

    def _mismatch(self, name: str) -> PromptModelMismatchError:
        return PromptModelMismatchError(
            f"prompt {name!r} has no version for the base model {self.spec.architecture} ({self.spec.fingerprint})",
            param="prompt",
        )

    def _event(self, what: str, record: PromptRecord) -> dict[str, object]:
        return {
            "type": what,
            "version": record.version,
            "number": record.number,
            "base_fingerprint": record.base_fingerprint,
            "at": int(self._clock()),
        }


def _check_owned(tenant: str, name: str) -> None:
    check_tenant(tenant)
    check_name(name)


def _may_see_name(viewer: str, owner: str, state: PromptName) -> bool:
    return state.is_public or (bool(state.current) and (viewer == owner or viewer in state.shared_with))


def _as_seen(viewer: str, state: PromptName, record: PromptRecord) -> PromptRecord | None:
    """Return a version as a tenant sees it; None where it may not."""
    if viewer == record.tenant or record.visibility == "public":
        return record
    return replace(record, is_granted=True) if viewer in state.shared_with else None
