"""What the operator has set down about one tenant: keys and limits. One record: every change of it is one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from promptd_store.schema import known_fields, read_fields, stamped, unknown_fields

from promptd.tenancy.limits import NO_LIMITS, TenantLimits
from promptd.tenancy.scopes import Scope

MAX_ACTIVE_KEYS = 2
"""One in use and one to change to."""
MAX_ENDED_KEYS = 8
"""Ended keys that are still listed."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One issued key. Times are seconds since 1970."""

    id: str
    digest: str
    """HMAC-SHA256 of the key."""
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    label: str = ""
    unknown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a newer release has written down here; it is left as it is."""

    def is_active(self, now: float) -> bool:
        """Whether the key opens anything."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class QuarantinedPrompt:
    """A version that is not served, because the model's numbers were not finite with it."""

    version: str
    prompt: str
    """The name that it was asked for by."""
    at: float


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant; one that was never mentioned is `Tenant(name)`."""

    name: str
    limits: TenantLimits = NO_LIMITS
    keys: tuple[KeyRecord, ...] = ()
    audit_head: str = ""
    """Digest of the newest entry of its audit log; the next entry carries it."""
    quarantined: tuple[QuarantinedPrompt, ...] = ()
    erased_at: float | None = None
    """When everything of it was erased; nothing comes after."""
    unknown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a newer release has written down here; it is left as it is."""

    def key(self, key_id: str) -> KeyRecord | None:
        """Return one of its keys, ended or not."""
        return next((key for key in self.keys if key.id == key_id), None)

    def active_keys(self, now: float) -> list[KeyRecord]:
        """Return the keys that work."""
        return [key for key in self.keys if key.is_active(now)]

    def is_quarantined(self, version: str) -> bool:
        """Return whether a version of its prompts is not served."""
        return any(one.version == version for one in self.quarantined)

    def with_key(self, changed: KeyRecord, now: float) -> Tenant:
        """Return the tenant with a key added or replaced; the oldest ended ones are forgotten."""
        keys = [key for key in self.keys if key.id != changed.id] + [changed]
        ended = [key for key in keys if not key.is_active(now)]
        forgotten = {key.id for key in ended[: max(0, len(ended) - MAX_ENDED_KEYS)]}
        return replace(self, keys=tuple(key for key in keys if key.id not in forgotten))

    def to_bytes(self) -> bytes:
        """Write the record."""
        plain = asdict(self)
        plain["keys"] = [{**key.pop("unknown"), **key} for key in plain["keys"]]
        return json.dumps(stamped(plain, plain.pop("unknown"))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tenant:
        """Read what `to_bytes` wrote."""
        plain = read_fields(cls, data)
        keys, limits = plain.pop("keys"), plain.pop("limits", {})
        plain["unknown"]["limits"] = unknown_fields(TenantLimits, limits)
        found = plain.pop("quarantined", [])
        return cls(
            keys=tuple(_key_of(one) for one in keys),
            limits=TenantLimits(**known_fields(TenantLimits, limits)),
            quarantined=tuple(QuarantinedPrompt(**known_fields(QuarantinedPrompt, one)) for one in found),
            **plain,
        )


def _key_of(plain: Mapping[str, Any]) -> KeyRecord:
    known = known_fields(KeyRecord, plain)
    known["scopes"] = tuple(map(Scope, known["scopes"]))
    return KeyRecord(**known, unknown=unknown_fields(KeyRecord, plain))
