"""The console: a static page of plain ES modules, served as it lies in `static/`. There is no build step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STATIC_PATH = Path(__file__).parent / "static"
START_PAGE = "index.html"
MEDIA_TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
"""What lies in the folder: a file of another kind is not served."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file. Its etag is its content."""

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> Mapping[str, Asset]:
    """Return every file of the console by its path, read once: a request can name these and nothing else."""
    found = {}
    for path in sorted(STATIC_PATH.rglob("*")):
        media_type = MEDIA_TYPES.get(path.suffix)
        if media_type is not None and path.is_file():
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(STATIC_PATH).as_posix()] = Asset(content, media_type, etag)
    return found
