"""Install pip into the Python that runs this, from the package index, with nothing but the standard library."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
TIMEOUT_SECONDS = 30

_WHEEL = re.compile(r".*/(pip-(\d+(?:\.\d+)*)-py3-none-any\.whl)#sha256=([0-9a-f]{64})")
_AT_LEAST = re.compile(r">=(\d+)\.(\d+)")


class WheelLinks(HTMLParser):
    """The wheels on a page of the simple index that run on this Python: release -> link."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[tuple[int, ...], str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the link of a final release."""
        values = dict(attrs)
        link = _WHEEL.fullmatch(values.get("href") or "")
        needs = _AT_LEAST.search(values.get("data-requires-python") or "")
        if link and (needs is None or sys.version_info >= (int(needs[1]), int(needs[2]))):
            self.links[tuple(int(part) for part in link[2].split("."))] = link[0]


def fetch(url: str) -> bytes:
    """Read a whole resource of the index."""
    if not url.startswith(("https://", "http://")):
        sys.exit(f"{url}: not a web address")
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as reply:  # noqa: S310 - the scheme is checked above
        content: bytes = reply.read()
    return content


def main() -> None:
    """Pick the newest wheel, check its digest, and let it install itself."""
    page = WheelLinks()
    page.feed(fetch(INDEX).decode())
    if not page.links:
        sys.exit(f"{INDEX}: no wheel of pip there")
    link = urllib.parse.urljoin(INDEX, page.links[max(page.links)])
    name, _, digest = (_WHEEL.fullmatch(link) or sys.exit(f"{link}: not a wheel of pip")).groups()
    wheel = fetch(link)
    if hashlib.sha256(wheel).hexdigest() != digest:
        sys.exit(f"{name}: the digest is not the one that the index names")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(wheel)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(path)}
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)  # noqa: S603 - our own command


if __name__ == "__main__":
    main()
