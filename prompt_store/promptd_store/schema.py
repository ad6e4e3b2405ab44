"""Records of two releases side by side: each carries its schema's version, and what a release does not know it leaves.

A new field is no new version: older releases ignore it. A change that they would misread is one: they refuse it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from promptd_store.errors import RecordTooNewError

SCHEMA_VERSION = 1


def stamped(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's fields with the version of their schema."""
    return {**plain, "schema_version": SCHEMA_VERSION}


def read_fields(kind: type[Any], data: bytes) -> dict[str, Any]:
    """Parse a record and keep the fields that this release knows of `kind`, a dataclass.

    Raises `RecordTooNewError` for a version that this release does not know. Records without one are of the first.
    """
    plain = json.loads(data)
    version = plain.get("schema_version", 1)
    if version > SCHEMA_VERSION:
        raise RecordTooNewError(
            f"a {kind.__name__} has schema version {version}, written by a newer release; this one knows "
            f"{SCHEMA_VERSION}"
        )
    return known_fields(kind, plain)


def known_fields(kind: type[Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the fields that this release knows of a dataclass."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in plain.items() if name in names}
