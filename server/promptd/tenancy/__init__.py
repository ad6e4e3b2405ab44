"""Tenants: who they are, what they may do, and how much of the server is theirs. Knows neither HTTP nor models."""

from promptd.tenancy.audit import AuditEntry, is_unbroken, read_audit
from promptd.tenancy.book import TenantBook
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.key_office import DEFAULT_GRACE_SECONDS, Issued, KeyOffice
from promptd.tenancy.key_ring import KeyRing
from promptd.tenancy.scopes import GRANTABLE_SCOPES, TENANT_SCOPES, Principal, Scope
from promptd.tenancy.tenant import KeyRecord, Tenant

__all__ = [
    "DEFAULT_GRACE_SECONDS",
    "GRANTABLE_SCOPES",
    "TENANT_SCOPES",
    "AuditEntry",
    "Issued",
    "KeyOffice",
    "KeyRecord",
    "KeyRing",
    "Principal",
    "Scope",
    "Tenant",
    "TenantBook",
    "TenantDirectory",
    "is_unbroken",
    "read_audit",
]
