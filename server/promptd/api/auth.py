"""Who is asking, and what they may do: one principal, one `authorize`."""

from __future__ import annotations

import enum
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from promptd_store import PromptRecord

from promptd.errors import AuthenticationError, NotFoundError, PermissionDeniedError


class Scope(enum.StrEnum):
    """What a route needs."""

    OPEN = "open"
    INFER = "infer"
    PROMPTS_READ = "prompts:read"
    PROMPTS_WRITE = "prompts:write"
    TRAIN = "train"
    ADMIN = "admin"


TENANT_SCOPES = frozenset({Scope.INFER, Scope.PROMPTS_READ, Scope.PROMPTS_WRITE, Scope.TRAIN})


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    tenant: str
    scopes: frozenset[Scope]


class KeyRing:
    """Static keys from the environment. Without any, every caller is the default tenant with all scopes."""

    def __init__(self, tenant_keys: Mapping[str, str], admin_key: str | None, default_tenant: str) -> None:
        self._principals = [(key.encode(), Principal(tenant, TENANT_SCOPES)) for key, tenant in tenant_keys.items()]
        if admin_key is not None:
            self._principals.append((admin_key.encode(), Principal(default_tenant, TENANT_SCOPES | {Scope.ADMIN})))
        self._open = Principal(default_tenant, frozenset(Scope)) if not self._principals else None

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._open is not None

    def authenticate(self, authorization: str | None) -> Principal:
        """Return the caller behind `Authorization: Bearer KEY`; raises `AuthenticationError`."""
        if self._open is not None:
            return self._open
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise AuthenticationError("no API key: send it as 'Authorization: Bearer KEY'", code="missing_api_key")
        found = None
        for key, principal in self._principals:  # every key is compared, so that time tells nothing
            if hmac.compare_digest(key, given.strip().encode()):
                found = principal
        if found is None:
            raise AuthenticationError("this API key is not known")
        return found


def check_local(host: str | None, origin: str | None) -> None:
    """Without keys the loopback address is the only guard, and a browser on this machine could be led around it.

    A page of some site may send its visitors' browsers here (`Origin` names it), or point its own name at 127.0.0.1 and
    read the answers as its own (DNS rebinding; `Host` names it). Raises `PermissionDeniedError` for both.
    """
    for name, value in (("Host", f"//{host}" if host is not None else None), ("Origin", origin)):
        if value is not None and not _is_local(value):
            raise PermissionDeniedError(
                f"{name} {value.removeprefix('//')[:100]!r} is not this machine: a server without keys answers only to "
                "localhost; set PROMPTD_API_KEYS or PROMPTD_ADMIN_KEY to serve other names",
                code="host_not_allowed",
            )


def _is_local(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def authorize(principal: Principal, scope: Scope, record: PromptRecord | None = None) -> None:
    """The one decision: default deny; a foreign record looks like an absent one."""
    if scope is not Scope.OPEN and scope not in principal.scopes:
        raise PermissionDeniedError(f"this key lacks the scope {scope.value!r}")
    if record is not None and record.tenant != principal.tenant:
        may_read = record.visibility == "public" and scope in (Scope.INFER, Scope.PROMPTS_READ)
        if not may_read:
            raise NotFoundError(f"no prompt {record.name!r}", param="prompt")
