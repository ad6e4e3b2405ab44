"""A transaction in the words of its script: what that is given, and what its answer means."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from promptd_store.base import Add, Append, Condition, HasBlob, Lease, Put
from promptd_store.blobs import digest_hex
from promptd_store.errors import (
    BlobNotFoundError,
    CheckFailedError,
    LeaseLostError,
    LimitReachedError,
    TenantErasedError,
)
from promptd_store.names import check_tenant


def words_of(
    checks: Sequence[Condition],
    puts: Sequence[Put],
    deletes: Sequence[str],
    appends: Sequence[Append],
    adds: Sequence[Add],
) -> list[str | bytes | int]:
    """Return what stands behind the prefix in `scripts.TRANSACT`; the nonce makes it harmless to repeat."""
    words: list[str | bytes | int] = [
        secrets.token_hex(16), len(checks), len(adds), len(deletes), len(puts), len(appends)
    ]  # fmt: skip
    for check in checks:
        if isinstance(check, Lease):
            words += ["lease", check.key, check.owner, check.epoch]
        elif isinstance(check, HasBlob):
            words += ["blob", check_tenant(check.tenant), digest_hex(check.digest), ""]
        else:
            words += ["record", check.key, check.etag or "", ""]
    for add in adds:
        words += [add.key, add.amount, add.limit_key or ""]
    words += deletes
    for put in puts:
        words += [put.key, put.value]
    for append in appends:
        words += [append.log, append.payload]
    return words


def outcome_of(answer: Sequence[bytes]) -> tuple[str, list[int]]:
    """Return the etag and the seqs; raises what stood against the transaction."""
    outcome, *rest = [word.decode() for word in answer]
    if outcome == "lost":
        raise LeaseLostError.of(rest[0], rest[1], int(rest[2]))
    if outcome == "check":
        raise CheckFailedError(rest[0], rest[1] or None, rest[2] or None)
    if outcome == "blob":
        raise BlobNotFoundError(f"no blob sha256:{rest[0]}", param=f"sha256:{rest[0]}")
    if outcome == "erased":
        raise TenantErasedError(rest[0])
    if outcome == "limit":
        raise LimitReachedError(rest[0], *map(int, rest[1:]))
    return rest[0], [int(seq) for seq in rest[1:]]
