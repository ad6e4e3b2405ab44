"""Rules of a publication that do not look at the artifact."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from promptd_store.errors import ArtifactError, PromptNameError
from promptd_store.names import PUBLIC_TENANT, check_name, check_tenant
from promptd_store.record import PromptRecord
from promptd_store.strict_json import canonical_json, shown

MAX_PROVENANCE_BYTES = 64 << 10


def check_publication(
    tenant: str, name: str, reserved_names: Collection[str], visibility: str, provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Refuse bad and reserved names and an unknown visibility; return the provenance as plain, small JSON."""
    check_name(name)
    if check_tenant(tenant) == PUBLIC_TENANT:
        raise PromptNameError(
            f"tenant {PUBLIC_TENANT!r} is reserved", param="tenant", code="tenant_reserved", status=409
        )
    if name in reserved_names:
        raise PromptNameError(
            f"prompt name {name!r} is reserved: it names a base model",
            param="name",
            code="prompt_name_reserved",
            status=409,
        )
    if visibility not in ("private", "public"):
        raise ArtifactError(
            "visibility_invalid", f"visibility must be private or public, got {shown(visibility)}", "visibility"
        )
    try:
        text = canonical_json(dict(provenance or {}))
        size = len(text.encode())
    except (TypeError, ValueError) as error:
        raise ArtifactError("provenance_invalid", f"provenance is not JSON: {error}", "provenance") from None
    if size > MAX_PROVENANCE_BYTES:
        raise ArtifactError(
            "provenance_invalid",
            f"provenance has {size} bytes, at most {MAX_PROVENANCE_BYTES} are allowed",
            "provenance",
        )
    plain: dict[str, Any] = json.loads(text)
    return plain


def is_same_publication(present: PromptRecord, draft: PromptRecord) -> bool:
    """Return whether publishing the draft over the present version would change nothing that anyone can see."""
    return (
        (present.version, present.content_digest, present.adapter_config_digest, present.visibility)
        == (draft.version, draft.content_digest, draft.adapter_config_digest, draft.visibility)
        and (present.behind, present.user) == (draft.behind, draft.user)
        and draft.provenance in ({}, present.provenance)
        and draft.sidecar_digest in (None, present.sidecar_digest)
    )
