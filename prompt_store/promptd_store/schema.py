"""Records of two releases side by side: each carries its schema's version, and what a release does not know it leaves.

A new field is no new version: older releases ignore it, and leave it where they write the record anew. A change that
they would misread is one: they refuse it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from promptd_store.errors import RecordTooNewError

SCHEMA_VERSION = 1
NOTHING: Mapping[str, Any] = MappingProxyType({})


def stamped(plain: Mapping[str, Any], unknown: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """Return a record's fields with what was unknown of it when it was read, and with the version of their schema."""
    return {**_joined(plain, unknown), "schema_version": SCHEMA_VERSION}


def read_fields(kind: type[Any], data: bytes) -> dict[str, Any]:
    """Parse a record and keep the fields that this release knows of `kind`, a dataclass.

    Where `kind` has a field `unknown`, the others are kept there, for `stamped`. Raises `RecordTooNewError` for a
    version that this release does not know. Records without one are of the first.
    """
    plain = json.loads(data)
    version = plain.pop("schema_version", 1)
    if version > SCHEMA_VERSION:
        raise RecordTooNewError(
            f"a {kind.__name__} has schema version {version}, written by a newer release; this one knows "
            f"{SCHEMA_VERSION}"
        )
    known = known_fields(kind, plain)
    if "unknown" in _names(kind):
        known["unknown"] = unknown_fields(kind, plain)
    return known


def known_fields(kind: type[Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the fields that this release knows of a dataclass."""
    names = _names(kind)
    return {name: value for name, value in plain.items() if name in names}


def unknown_fields(kind: type[Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the others."""
    names = _names(kind)
    return {name: value for name, value in plain.items() if name not in names}


def _names(kind: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _joined(plain: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """Add what is missing, also in objects that lie in it by the same names."""
    joined = dict(plain)
    for name, value in unknown.items():
        if name not in joined:
            joined[name] = value
        elif isinstance(value, Mapping) and isinstance(joined[name], Mapping):
            joined[name] = _joined(joined[name], value)
    return joined
