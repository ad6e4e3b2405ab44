"""Where files and jobs lie in the store, and their ids.

What belongs to a tenant is keyed by that tenant. The queue is the one thing that workers read across tenants, so its
index lies under the public tenant's keys, apart for each base model.
"""

from __future__ import annotations

import hashlib
import secrets

from promptd_store.names import PUBLIC_TENANT

_END_OF_TIME_US = 1 << 52
"""Microseconds since 1970, in the year 2112; what is left until then shrinks, so new ids sort before old ones."""


def new_id(prefix: str, created_at: float) -> str:
    """Return an id nobody can guess; ids of one prefix have one length and sort newest first."""
    return f"{prefix}-{_END_OF_TIME_US - microseconds(created_at):013x}{secrets.token_hex(8)}"


def microseconds(at: float) -> int:
    """Return seconds since 1970 as whole microseconds."""
    return round(at * 1e6)


def file_key(tenant: str, file_id: str) -> str:
    """Key of a file's record."""
    return f"{{{tenant}}}:file:{file_id}"


def job_key(tenant: str, job_id: str) -> str:
    """Key of a job's record, and of the lease of the worker that runs it."""
    return f"{{{tenant}}}:job:{job_id}"


def job_log(tenant: str, job_id: str) -> str:
    """Log of a job's events."""
    return f"{{{tenant}}}:job-events:{job_id}"


def once_key(tenant: str, idempotency_key: str) -> str:
    """Key of the job that an idempotency key has created."""
    return f"{{{tenant}}}:job-once:{hashlib.sha256(idempotency_key.encode()).hexdigest()}"


def tally_key(base_fingerprint: str, tenant: str) -> str:
    """Key of how many jobs a tenant has waiting and active for one base model."""
    return _queue_key("tally", base_fingerprint, tenant)


def waiting_key(base_fingerprint: str, tenant: str, order: str) -> str:
    """Key of one queued job; `order` sorts them."""
    return _queue_key("waiting", base_fingerprint, f"{tenant}:{order}")


def active_key(base_fingerprint: str, order: str) -> str:
    """Key of one job that a worker has, or had when it was last heard of."""
    return _queue_key("active", base_fingerprint, order)


SIGNALS = f"{{{PUBLIC_TENANT}}}:job-signals:"
"""What all signal logs begin with."""


def signals_log(base_fingerprint: str) -> str:
    """Log of every change of state: there is a job to claim, or a running one shall stop."""
    return _queue_key("signals", base_fingerprint, "")


def _queue_key(what: str, base_fingerprint: str, rest: str) -> str:
    return f"{{{PUBLIC_TENANT}}}:job-{what}:{base_fingerprint.removeprefix('sha256:')[:16]}:{rest}"
