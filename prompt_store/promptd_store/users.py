"""End users of a tenant: prompts, files and jobs may belong to one, so that this one person can be erased.

Whoever writes something of a user checks the user's mark in the same step, as it was when the writing began; erasing
writes a new mark first. So nothing that was on its way comes after, and the next thing that begins is welcome.
"""

from __future__ import annotations

import hashlib

from promptd_store.base import Check, Put, Store
from promptd_store.errors import CheckFailedError, UserErasedError

MAX_USER_CHARS = 256


def user_key(tenant: str, user: str) -> str:
    """Key of a user's mark; names no user."""
    return f"{{{tenant}}}:user:{hashlib.sha256(user.encode()).hexdigest()}"


async def user_checks(store: Store, tenant: str, user: str | None) -> list[Check]:
    """Return the check for a step that writes something of a user; none where it is nobody's."""
    if user is None:
        return []
    stored = await store.get(user_key(tenant, user))
    return [Check(user_key(tenant, user), None if stored is None else stored.etag)]


def raise_if_erased(error: CheckFailedError, tenant: str, user: str | None) -> None:
    """Raise `UserErasedError` where a step failed because its user was erased meanwhile."""
    if user is not None and error.key == user_key(tenant, user):
        raise UserErasedError("what belongs to this user was erased meanwhile", param="user") from error


async def mark_erased(store: Store, tenant: str, user: str) -> None:
    """Stop whatever is on its way."""
    await store.transact(puts=[Put(user_key(tenant, user), b"erased")])
