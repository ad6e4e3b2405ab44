"""Install pip into the Python that runs this, from the package index, with nothing but the standard library."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
TIMEOUT_SECONDS = 30


def fetch(url: str, accept: str = "*/*") -> bytes:
    """Read a whole https resource."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
        content: bytes = reply.read()
    return content


def release(name: str) -> tuple[int, ...]:
    """Return `(26, 3)` for `pip-26.3-py3-none-any.whl`; pre-releases and other files sort last."""
    parts = name.removeprefix("pip-").removesuffix("-py3-none-any.whl").split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def main() -> None:
    """Pick the newest wheel, check its digest, and let it install itself."""
    page = json.loads(fetch(INDEX, "application/vnd.pypi.simple.v1+json"))
    newest = max(page["files"], key=lambda file: release(file["filename"]))
    wheel = fetch(urllib.parse.urljoin(INDEX, newest["url"]))
    if hashlib.sha256(wheel).hexdigest() != newest["hashes"]["sha256"]:
        sys.exit(f"{newest['filename']}: the digest is not the one that the index names")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / newest["filename"]
        path.write_bytes(wheel)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", str(path)]
        sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": str(path)}, check=False).returncode)


if __name__ == "__main__":
    main()
