"""If-Match and If-None-Match, as HTTP means them."""

from __future__ import annotations

from promptd_store.errors import PreconditionFailedError


def check_preconditions(current: str | None, if_match: str | None, if_none_match: str | None) -> None:
    """Compare a name's present etag (None: there is none) with `*`, one etag or a list, quoted or not."""
    if if_match is not None:
        wanted = _etags(if_match, weak_too=False)
        if current is None or not ("*" in wanted or current in wanted):
            raise PreconditionFailedError(
                f"If-Match is {if_match[:200]}, the present etag is {current or 'none'}", param="If-Match"
            )
    if if_none_match is not None and current is not None:
        unwanted = _etags(if_none_match, weak_too=True)
        if "*" in unwanted or current in unwanted:
            raise PreconditionFailedError(
                f"If-None-Match is {if_none_match[:200]}, the present etag is {current}", param="If-None-Match"
            )


def _etags(header: str, *, weak_too: bool) -> set[str]:
    """Split a header; a weak etag never matches where the comparison is strong (If-Match)."""
    found = set()
    for part in header.split(","):
        tag = part.strip()
        if tag.startswith("W/"):
            if not weak_too:
                continue
            tag = tag[2:]
        found.add(tag.strip('"'))
    return found
