"""Where the operator's records about tenants lie. They are no tenant's own, so they stand under the public one."""

from __future__ import annotations

from promptd_store.names import PUBLIC_TENANT

CHANGES_LOG = f"{{{PUBLIC_TENANT}}}:tenant-changes"
"""Names of tenants whose record was changed: every server follows it."""
ERASURES_LOG = f"{{{PUBLIC_TENANT}}}:erasures"
"""What every server is to forget."""
KEY_SECRET = f"{{{PUBLIC_TENANT}}}:key-secret"
AUDIT_LOGS = f"{{{PUBLIC_TENANT}}}:audit:"
"""What all audit logs begin with."""


def tenant_key(tenant: str) -> str:
    """Key of a tenant's record."""
    return f"{{{PUBLIC_TENANT}}}:tenant:{tenant}"


def rate_key(tenant: str, kind: str) -> str:
    """Key of what a tenant has left of a minute's allowance of one kind."""
    return f"{{{PUBLIC_TENANT}}}:rate:{kind}:{tenant}"


def slots_key(tenant: str) -> str:
    """Key of the requests that a tenant has open, by server."""
    return f"{{{PUBLIC_TENANT}}}:slots:{tenant}"


def places_key(tenant: str) -> str:
    """Key of the requests that a tenant has waiting, by server."""
    return f"{{{PUBLIC_TENANT}}}:places:{tenant}"


def salt_of(tenant: str) -> str:
    """Return what a tenant's keys and values are cached under: no other tenant's are, and no caller chooses it."""
    return f"tenant/{tenant}"


def owner_key(key_id: str) -> str:
    """Key of the tenant that an API key belongs to."""
    return f"{{{PUBLIC_TENANT}}}:api-key:{key_id}"


def audit_log(tenant: str) -> str:
    """Log of what was done to a tenant by admins; no log's name is the beginning of another's."""
    return f"{AUDIT_LOGS}{tenant}:"
