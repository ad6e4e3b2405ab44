"""The console as files: what is sent, under which policy, and that it needs nobody else. No browser here."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import httpx
import pytest

from promptd.api import console
from promptd.ui import MEDIA_TYPES, START_PAGE, STATIC_PATH, assets
from tests.api.conftest import LiveServer

MAX_BYTES = 300_000
LICENSES = {"vendor/uPlot-LICENSE.txt"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"
REFERENCE = re.compile(
    r"""(?:src|href)="([^"#]+)"|\bfrom\s+"([^"]+)"|\bimport\("([^"]+)"\)|(?<![a-z])url\(([^)]+)\)"""
    r"""|new URL\("([^"]+)",\s*import\.meta\.url\)"""
)
HTML_FROM_TEXT = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc")
OWN_FILES = sorted(name for name in assets() if not name.startswith("vendor/"))


def references(name: str) -> set[str]:
    """What a file loads, as paths of the console; `../…` are the server's own routes."""
    text = assets()[name].content.decode()
    found = {next(group for group in match.groups() if group) for match in REFERENCE.finditer(text)}
    folder = PurePosixPath(name).parent
    return {(folder / reference).as_posix() for reference in found if not reference.startswith("../")}


def test_every_file_is_sent_as_what_it_is(server: LiveServer) -> None:
    """Right type, strict policy, and nothing of the page may be kept without asking."""
    with server.http() as http:
        for name, asset in assets().items():
            reply = http.get(f"/ui/{name}")
            assert (reply.status_code, reply.content) == (200, asset.content)
            assert reply.headers["content-type"] == MEDIA_TYPES[PurePosixPath(name).suffix]
            assert {key: reply.headers[key] for key in console.HEADERS} == console.HEADERS
        assert http.get("/ui/").content == assets()[START_PAGE].content
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]


def test_what_a_browser_has_is_not_sent_again(server: LiveServer) -> None:
    """The etag is the content; HEAD says the same as GET."""
    with server.http() as http:
        first = http.get("/ui/app.js")
        again = http.get("/ui/app.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
        assert http.get("/ui/app.js", headers={"If-None-Match": '"other"'}).status_code == 200  # control
        assert http.get("/ui/dom.js").headers["etag"] != first.headers["etag"]
        head = http.head("/ui/app.js")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == first.headers["content-length"]


def test_addresses_lead_to_the_console(server: LiveServer) -> None:
    """`/`, `/ui` and `/docs` lead to `ui/` beside them, so that a path in front of both stays."""
    with server.http() as http:
        for path in ("/", "/ui"):
            reply = http.get(path)
            assert (reply.status_code, reply.headers["location"]) == (307, "ui/")
            assert http.get(path, follow_redirects=True).url.path == "/ui/"
        reply = http.get("/docs")
        assert (reply.status_code, reply.headers["location"]) == (307, "ui/#/reference")


@pytest.mark.parametrize(
    "path",
    ["nothing.js", "../__init__.py", "%2e%2e/__init__.py", "..%2f__init__.py", "/etc/passwd", "vendor", "vendor/"],
)
def test_only_the_files_of_the_page_are_there(server: LiveServer, path: str) -> None:
    """Whatever else is asked for is a 404 in the envelope."""
    with server.http() as http:
        reply = http.send(http.build_request("GET", httpx.URL(f"{server.url}/ui/{path}")))
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "route_not_found"


def test_the_start_page_leads_to_every_file() -> None:
    """Nothing that is loaded is missing, and nothing lies there that no page loads."""
    reached, new = set(), {START_PAGE}
    while new:
        reached |= new
        new = {other for name in new if name.endswith((".html", ".js", ".css")) for other in references(name)} - reached
        assert new <= set(assets()), "a file is loaded that is not there"
    assert reached | LICENSES == set(assets())
    on_disk = {path.relative_to(STATIC_PATH).as_posix() for path in STATIC_PATH.rglob("*") if path.is_file()}
    assert on_disk == set(assets()), "a file of a kind that is not served"


def test_no_other_host_and_no_absolute_path() -> None:
    """The page works offline and behind any path: addresses are relative, and only `api.js` sends requests."""
    for name in OWN_FILES:
        text = assets()[name].content.decode()
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text.replace(SVG_NAMESPACE, "")), name
        assert not [one for one in REFERENCE.findall(text) if any(part.startswith("/") for part in one)], name
        assert name == "api.js" or not re.search(
            r"\bfetch\(|XMLHttpRequest|EventSource\(|WebSocket\(|sendBeacon", text
        ), name


def test_no_text_becomes_html_and_no_style_or_script_stands_inline() -> None:
    """The policy would stop it; here it is not even tried."""
    for name in OWN_FILES:
        text = assets()[name].content.decode()
        assert not [way for way in HTML_FROM_TEXT if way in text], name
    page = assets()[START_PAGE].content.decode()
    assert "<style" not in page
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r"\s(?:on\w+|style)=", page)


def test_the_key_is_kept_in_memory_only() -> None:
    """Nothing is stored but the theme, and cookies are not touched."""
    for name in OWN_FILES:
        text = assets()[name].content.decode()
        assert "sessionStorage" not in text and "document.cookie" not in text and "indexedDB" not in text, name
        assert name == "theme.js" or "localStorage" not in text, name


def test_the_whole_page_is_small() -> None:
    """All of it, charts included, as it goes over the wire."""
    assert sum(len(asset.content) for asset in assets().values()) <= MAX_BYTES
