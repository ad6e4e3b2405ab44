"""Tenants: who they are, what they may do, and how much of the server is theirs. Knows neither HTTP nor models."""

from promptd.tenancy.audit import AuditEntry, is_unbroken, read_audit
from promptd.tenancy.book import TenantBook
from promptd.tenancy.budget import Budget, ServerBudgets
from promptd.tenancy.calls import CallLog, calls_log, trim_calls
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.erasure import Eraser, Erasure
from promptd.tenancy.gate import Claim, Gate, Visit
from promptd.tenancy.key_office import DEFAULT_GRACE_SECONDS, Issued, KeyOffice
from promptd.tenancy.key_ring import KeyRing
from promptd.tenancy.limits import LIMIT_NAMES, TenantLimits
from promptd.tenancy.places import PlacePool
from promptd.tenancy.policy import holdings_of, set_limits
from promptd.tenancy.quarantine import lift, quarantine
from promptd.tenancy.rates import RateMeter
from promptd.tenancy.scopes import GRANTABLE_SCOPES, TENANT_SCOPES, Principal, Scope
from promptd.tenancy.slots import SlotPool
from promptd.tenancy.store_keys import ERASURES_LOG, salt_of
from promptd.tenancy.tenant import KeyRecord, QuarantinedPrompt, Tenant
from promptd.tenancy.usage import Counts, UsageKey, UsageLedger, note_stored_bytes
from promptd.tenancy.uses import note_beginning, used_prompts

__all__ = [
    "DEFAULT_GRACE_SECONDS",
    "ERASURES_LOG",
    "GRANTABLE_SCOPES",
    "LIMIT_NAMES",
    "TENANT_SCOPES",
    "AuditEntry",
    "Budget",
    "CallLog",
    "Claim",
    "Counts",
    "Eraser",
    "Erasure",
    "Gate",
    "Issued",
    "KeyOffice",
    "KeyRecord",
    "KeyRing",
    "PlacePool",
    "Principal",
    "QuarantinedPrompt",
    "RateMeter",
    "Scope",
    "ServerBudgets",
    "SlotPool",
    "Tenant",
    "TenantBook",
    "TenantDirectory",
    "TenantLimits",
    "UsageKey",
    "UsageLedger",
    "Visit",
    "calls_log",
    "holdings_of",
    "is_unbroken",
    "lift",
    "note_beginning",
    "note_stored_bytes",
    "quarantine",
    "read_audit",
    "salt_of",
    "set_limits",
    "trim_calls",
    "used_prompts",
]
