"""Chains: a prompt that was learned behind others names them in its record, and is served with them in front.

The names are exact versions, so what is in front never changes; it is stored once, whoever stands behind it. Where one
of them is deleted, whatever stands behind it cannot be asked until the same bytes are published there again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from promptd_store.errors import ArtifactError, PromptChainBrokenError, PromptNotFoundError
from promptd_store.record import PromptRecord

MAX_CHAIN_PROMPTS = 16
"""Prompts that one request may chain, however they are named."""

Resolve = Callable[[str], Awaitable[PromptRecord]]


async def in_front(resolve: Resolve, record: PromptRecord) -> list[PromptRecord]:
    """Return what a prompt stands behind, from the chain's beginning. Raises `PromptChainBrokenError`."""
    found = []
    for name in record.behind:
        try:
            found.append(await resolve(name))
        except PromptNotFoundError:
            raise PromptChainBrokenError(
                f"prompt {record.name!r} stands behind {name!r}, which is not there (any more)", param="prompt"
            ) from None
    return found


def extend(chain: list[PromptRecord], front: Sequence[PromptRecord], record: PromptRecord) -> None:
    """Put a prompt at a chain's end, behind what it stands behind, unless that is the chain's end already."""
    wanted = [one.version for one in front]
    if wanted != [one.version for one in chain][len(chain) - len(wanted) :]:
        chain.extend(front)
    chain.append(record)


def exact_name(record: PromptRecord) -> str:
    """Return a name that means this version for ever."""
    return f"{record.tenant}/{record.name}@{record.version}"


def check_front(front: Sequence[PromptRecord], visibility: str) -> None:
    """Refuse a chain that could not be served to everybody who may see its last prompt."""
    if len(front) >= MAX_CHAIN_PROMPTS:
        raise ArtifactError(
            "chain_too_long",
            f"behind names {len(front)} prompts with all that these stand behind, {MAX_CHAIN_PROMPTS - 1} are allowed",
            "behind",
        )
    hidden = [one.name for one in front if visibility == "public" and one.visibility != "public"]
    if hidden:
        raise ArtifactError(
            "behind_not_public", f"a public prompt cannot stand behind private ones: behind has {hidden}", "behind"
        )
