"""What a key may do, and who stands behind it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Scope(enum.StrEnum):
    """What a route needs."""

    OPEN = "open"
    INFER = "infer"
    PROMPTS_READ = "prompts:read"
    PROMPTS_WRITE = "prompts:write"
    TRAIN = "train"
    ADMIN = "admin"


TENANT_SCOPES = frozenset({Scope.INFER, Scope.PROMPTS_READ, Scope.PROMPTS_WRITE, Scope.TRAIN})
"""What a key may do unless it was asked for less; `admin` is never implied."""
GRANTABLE_SCOPES = TENANT_SCOPES | {Scope.ADMIN}


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str = ""
    """Names the key in usage and audit; never the key itself."""
