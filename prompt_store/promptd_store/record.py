"""What the catalog knows about one published version, and the name that points to versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from promptd_store.manifest import PromptKind
from promptd_store.schema import known_fields, read_fields, stamped
from promptd_store.strict_json import canonical_json

Visibility = Literal["private", "public"]
ANY_BASE = "*"
"""The base of prompts that fit every base model: texts."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One published version. Identity is `version`; everything else here is about the publication."""

    tenant: str
    name: str
    version: str
    number: int
    kind: PromptKind
    num_virtual_tokens: int
    num_bytes: int
    """Size of the uploaded file."""
    base_fingerprint: str | None
    """The base model that it was checked against; None for a text that fits all."""
    created_at: int
    """Seconds since 1970."""
    etag: str
    """For If-Match (without quotes); the name's etag where this is the current version."""
    provenance: Mapping[str, Any]
    visibility: Visibility
    verified: bool
    """True where the file itself named the base model."""
    manifest: Mapping[str, Any]
    content_digest: str
    adapter_config_digest: str | None = None
    sidecar_digest: str | None = None
    behind: tuple[str, ...] = ()
    """Exact names of the prompts that it is served behind, from the chain's beginning."""
    user: str | None = None
    """The end user of its tenant whom it belongs to, where it was said."""
    stored_bytes: int = 0
    """Of all that is kept for it; 0 in records that are older than the counting."""
    is_current: bool = True
    granted_to: str | None = None
    """The tenant that asked for it, where its owner shares it with that one; None for its own and for public ones."""

    @property
    def is_granted(self) -> bool:
        """Whether its owner shares it with the tenant that asked for it."""
        return self.granted_to is not None

    def name_for(self, viewer: str) -> str:
        """Return what a tenant names it by: `name`, or `owner/name` where it is another's."""
        return self.name if self.tenant == viewer else f"{self.tenant}/{self.name}"

    @property
    def digests(self) -> set[str]:
        """The blobs that it needs."""
        wanted = (self.content_digest, self.adapter_config_digest, self.sidecar_digest)
        return {digest for digest in wanted if digest is not None}

    @property
    def held_bytes(self) -> int:
        """What it counts for in its tenant's stored bytes."""
        return self.stored_bytes or self.num_bytes

    def to_bytes(self) -> bytes:
        """Write the immutable part."""
        plain = asdict(self)
        del plain["is_current"], plain["granted_to"]
        return json.dumps(stamped(plain)).encode()  # not sorted: the order of label words counts

    @classmethod
    def from_bytes(cls, data: bytes) -> PromptRecord:
        """Read what `to_bytes` wrote."""
        plain = read_fields(cls, data)
        plain["kind"] = PromptKind(plain["kind"])
        plain["behind"] = tuple(plain.get("behind", ()))
        return cls(**plain)


@dataclass(frozen=True, slots=True)
class CurrentVersion:
    """Where a name points for one base model."""

    number: int
    version: str
    revision: int
    visibility: Visibility

    @property
    def etag(self) -> str:
        """Changes with every move of the pointer, also back to an earlier version."""
        return f"{self.revision}-{self.version.removeprefix('sha256:')[:16]}"

    def applied_to(self, record: PromptRecord) -> PromptRecord:
        """Return the record as seen now: current or not, with the etag that goes with that."""
        if record.number != self.number:
            return replace(record, is_current=False)
        return replace(record, is_current=True, etag=self.etag)


@dataclass(frozen=True, slots=True)
class PromptName:
    """The one mutable record of a name. A tombstone keeps the counters, so that numbers and etags never come back."""

    next_number: int = 1
    revision: int = 0
    deleted: bool = False
    current: Mapping[str, CurrentVersion] = field(default_factory=dict)
    """By base fingerprint, or ANY_BASE."""
    shared_with: tuple[str, ...] = ()
    """Other tenants that may use and read all versions, by name."""
    was_shared: bool = False
    """Whether it ever was shared: then others may have its keys and values in a cache."""
    unknown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a newer release has written down here; it is left as it is."""

    def current_for(self, fingerprint: str) -> CurrentVersion | None:
        """Return what the name means for a base model: its own version or one that fits all, whichever is newer."""
        fitting = [self.current[base] for base in (fingerprint, ANY_BASE) if base in self.current]
        return max(fitting, key=lambda one: one.revision, default=None)

    @property
    def is_public(self) -> bool:
        """True where anything that the name points to is public."""
        return any(one.visibility == "public" for one in self.current.values())

    def applied_to(self, record: PromptRecord, fingerprint: str) -> PromptRecord:
        """Return the record as seen now: current where the name means it for its base; for this one, if it fits all."""
        pointer = self.current_for(record.base_fingerprint or fingerprint)
        return replace(record, is_current=False) if pointer is None else pointer.applied_to(record)

    def moved(self, base: str, number: int, version: str, visibility: Visibility) -> PromptName:
        """Return the name pointing elsewhere for one base."""
        moved = CurrentVersion(number, version, self.revision + 1, visibility)
        return replace(
            self,
            next_number=max(self.next_number, number + 1),
            revision=moved.revision,
            deleted=False,
            current={**self.current, base: moved},
        )

    def tombstone(self) -> PromptName:
        """Return the name pointing nowhere, for nobody."""
        return PromptName(self.next_number, self.revision + 1, True, {})

    def to_bytes(self) -> bytes:
        """Write the record."""
        plain = asdict(self)
        return canonical_json(stamped(plain, plain.pop("unknown"))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PromptName:
        """Read what `to_bytes` wrote."""
        plain = read_fields(cls, data)
        plain["current"] = {
            base: CurrentVersion(**known_fields(CurrentVersion, one)) for base, one in plain["current"].items()
        }
        plain["shared_with"] = tuple(plain.get("shared_with", ()))
        return cls(**plain)
