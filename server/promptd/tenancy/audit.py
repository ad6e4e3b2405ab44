"""The audit log: what admins did to a tenant, each entry written in the same step as the deed.

Entries of one tenant are a chain: each carries the digest of the one before, and the tenant's record the digest of the
last, so that an entry that was changed, left out or put in later is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from promptd_store import Store

from promptd.tenancy.store_keys import AUDIT_LOGS, audit_log

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One deed. No content, no secrets: names, ids and numbers."""

    at: float
    """Seconds since 1970."""
    by: str
    """Who did it: `tenant/key id`."""
    action: str
    tenant: str
    details: Mapping[str, Any]
    previous: str
    """Digest of the tenant's entry before this one; empty for the first."""

    def to_bytes(self) -> bytes:
        """Write the entry."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> AuditEntry:
        """Read what `to_bytes` wrote."""
        return cls(**json.loads(data))


def digest_of(data: bytes) -> str:
    """Return the digest by which the next entry names this one."""
    return hashlib.sha256(data).hexdigest()


async def read_payloads(store: Store, tenant: str) -> list[bytes]:
    """Return a tenant's whole log as it lies in the store, oldest first."""
    payloads: list[bytes] = []
    after = 0
    while page := await store.read_log(audit_log(tenant), after=after, limit=MAX_LISTED):
        payloads += [event.payload for event in page]
        after = page[-1].seq
    return payloads


async def read_audit(
    store: Store, tenant: str | None, *, after: int = 0, limit: int = MAX_LISTED
) -> list[tuple[int, AuditEntry]]:
    """Return (seq, entry) of one tenant or of all, oldest first."""
    log = AUDIT_LOGS if tenant is None else audit_log(tenant)
    events = await store.read_log(log, after=after, limit=limit)
    return [(event.seq, AuditEntry.from_bytes(event.payload)) for event in events]


def is_unbroken(payloads: Sequence[bytes], head: str) -> bool:
    """Return whether a tenant's whole log, oldest first, is what was written, up to the head in its record."""
    previous = ""
    for payload in payloads:
        if AuditEntry.from_bytes(payload).previous != previous:
            return False
        previous = digest_of(payload)
    return previous == head
