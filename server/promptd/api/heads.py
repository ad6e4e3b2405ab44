"""The head of an HTTP/1.1 request (RFC 9112), read where it leaves no doubt: in one piece, and plainly written.

Not a parser to serve by: whatever a client may write in two ways is left to the one that does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NAME, _VALUE = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", rb"[\t -~]*"
_HEAD = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.1\r\n((?:" + _NAME + b":" + _VALUE + rb"\r\n)+)\r\n")
_LENGTH = re.compile(r"[0-9]{1,15}")
_DOUBTS = frozenset({"transfer-encoding", "expect", "upgrade"})
_MAX_HEAD_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a request's body."""

    method: str
    target: str
    """Path and query, as they were written."""
    headers: Mapping[str, str]
    """By their names in lower case, each of which was there once."""
    num_bytes: int
    """Of the head itself."""
    body_bytes: int
    """Of what follows it."""
    closes: bool
    """Whether the client wants no more of this connection."""

    def num_missing(self, data: bytes) -> int:
        """Return how many bytes of the request are still to come; below 0 where the data goes on behind it."""
        return self.num_bytes + self.body_bytes - len(data)


def read_head(data: bytes) -> Head | None:
    """Read the head that the data begins with; None where it is not all here, or in doubt."""
    found = _HEAD.match(data, 0, _MAX_HEAD_BYTES)
    if found is None:
        return None
    lines = found[3].decode("ascii").split("\r\n")[:-1]
    fields = [line.partition(":") for line in lines]
    headers = {name.lower(): value.strip(" \t") for name, _, value in fields}
    length, connection = headers.get("content-length", "0"), headers.get("connection", "keep-alive").lower()
    is_plain = len(headers) == len(lines) and "host" in headers and _DOUBTS.isdisjoint(headers)
    if not is_plain or connection not in ("keep-alive", "close") or not _LENGTH.fullmatch(length):
        return None
    method, target = found[1].decode("ascii"), found[2].decode("ascii")
    return Head(method, target, headers, found.end(), int(length), connection == "close")
