"""What an API key looks like: `pd_<id>_<secret><checksum>`.

The fixed prefix and the checksum let secret scanners recognise a leaked key without asking anybody, and let the server
refuse a mistyped one without a look into the store. The id is no secret: it names the key in lists, usage and audit.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass

ID_CHARS = 12
SECRET_CHARS = 40
"""Base 62: 238 bits."""
CHECKSUM_CHARS = 6

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_KEY = re.compile(
    rf"(pd_([0-9A-Za-z]{{{ID_CHARS}}})_[0-9A-Za-z]{{{SECRET_CHARS}}})([0-9A-Za-z]{{{CHECKSUM_CHARS}}})", re.ASCII
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key in the clear: shown once, never stored."""

    id: str
    text: str

    def __repr__(self) -> str:
        return f"ApiKey({self.id!r}, …)"

    def digest(self, key_secret: bytes) -> str:
        """Return what is stored: HMAC-SHA256 under the server's secret."""
        return hmac.new(key_secret, self.text.encode(), hashlib.sha256).hexdigest()


def new_key() -> ApiKey:
    """Make a random key."""
    key_id = _random(ID_CHARS)
    body = f"pd_{key_id}_{_random(SECRET_CHARS)}"
    return ApiKey(key_id, body + _checksum(body))


def parse_key(text: str) -> ApiKey | None:
    """Read a key; None for anything that is none, or that was mistyped."""
    match = _KEY.fullmatch(text)
    if match is None or _checksum(match[1]) != match[3]:
        return None
    return ApiKey(match[2], text)


def _random(count: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(count))


def _checksum(body: str) -> str:
    value, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_CHARS):
        value, digit = divmod(value, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
