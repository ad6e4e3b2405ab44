"""What a caller may do: one `authorize` for every route and every record."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from promptd_store import PromptRecord

from promptd.errors import NotFoundError, PermissionDeniedError
from promptd.tenancy import Principal, Scope


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
        is_visible = record.visibility == "public" or record.is_granted
        if not is_visible or scope not in (Scope.INFER, Scope.PROMPTS_READ):
            raise NotFoundError(f"no prompt {record.name!r}", param="prompt")
