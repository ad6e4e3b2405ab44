"""Names of tenants and prompts, references to prompts, and the keys that they are stored under."""

from __future__ import annotations

import re
from dataclasses import dataclass

from promptd_store.errors import PromptNameError
from promptd_store.strict_json import shown

PUBLIC_TENANT = "public"
"""Where bare names of public prompts are looked up; nobody can own it."""
MAX_NUMBER_DIGITS = 9

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_VERSION = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_NUMBER = re.compile(rf"[1-9][0-9]{{0,{MAX_NUMBER_DIGITS - 1}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class PromptRef:
    """A parsed `[owner/]name[@N|@sha256:…]`; without number and version: whatever the name points to."""

    owner: str | None
    name: str
    number: int | None = None
    version: str | None = None


def check_name(name: str) -> str:
    """Return a prompt's name where it follows the rules."""
    if not _NAME.fullmatch(name):
        raise PromptNameError(
            f"prompt name {shown(name)} must be 1 to 96 letters, digits, '.', '_' or '-', the first a letter or digit",
            param="name",
        )
    return name


def check_tenant(tenant: str) -> str:
    """Return a tenant's name where it follows the rules."""
    if not _TENANT.fullmatch(tenant):
        raise PromptNameError(
            f"tenant {shown(tenant)} must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
            param="tenant",
        )
    return tenant


def parse_pin(text: str) -> tuple[int | None, str | None]:
    """Read `3`, or `sha256:…`, as (number, version)."""
    if _NUMBER.fullmatch(text):
        return int(text), None
    if _VERSION.fullmatch(text):
        return None, text
    raise PromptNameError(f"version {shown(text)} must be a number from 1 or sha256:<64 hex digits>", param="version")


def parse_name(text: str) -> PromptRef:
    """Read `[owner/]name`."""
    owner, slash, name = text.rpartition("/")
    return PromptRef(check_tenant(owner) if slash else None, check_name(name))


def parse_ref(ref: str) -> PromptRef:
    """Read `[owner/]name[@N|@sha256:…]`."""
    path, at, pin = ref.partition("@")
    named = parse_name(path)
    number, version = parse_pin(pin) if at else (None, None)
    return PromptRef(named.owner, named.name, number, version)


def prompt_key(tenant: str, name: str) -> str:
    """Key of the record that a name's versions hang from."""
    return f"{{{tenant}}}:prompt:{name}"


def version_key(tenant: str, name: str, number: int) -> str:
    """Key of one immutable version; numbers sort as text."""
    return f"{versions_prefix(tenant, name)}{number:0{MAX_NUMBER_DIGITS}d}"


def versions_prefix(tenant: str, name: str | None = None) -> str:
    """What the keys of all versions begin with, of one name or of all of a tenant's."""
    return f"{{{tenant}}}:version:" + ("" if name is None else f"{name}:")


def digest_key(tenant: str, name: str, version: str) -> str:
    """Key of the number that a content digest was last published under."""
    return f"{{{tenant}}}:digest:{name}:{version}"


def public_key(name: str) -> str:
    """Key of the owner of a bare public name."""
    return f"{{{PUBLIC_TENANT}}}:owner:{name}"


def granted_prefix(grantee: str) -> str:
    """What the keys of all that others share with a tenant begin with; behind it `name:owner`."""
    return f"{{{grantee}}}:granted:"


def granted_key(grantee: str, owner: str, name: str) -> str:
    """Key of the entry by which a tenant finds a prompt that another shares with it; entries sort by name."""
    return f"{granted_prefix(grantee)}{name}:{owner}"


ERASED = f"{{{PUBLIC_TENANT}}}:erased:"
"""What the tombstones of tenants begin with; behind it the tenant. Where there is one, every store refuses writes."""


def tenant_of(key: str) -> str:
    """Return the tenant that a key or a log belongs to."""
    return key[1:].partition("}")[0]


CHANGES_LOG = f"{{{PUBLIC_TENANT}}}:prompt-changes"
"""`tenant/name/revision` of every move of a name, of whatever tenant: every server reads it."""


def events_log(tenant: str) -> str:
    """Log of what happened to a tenant's prompts."""
    return f"{{{tenant}}}:events"
