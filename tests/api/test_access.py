"""Who may do what: every route against every kind of caller, and issued keys over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from promptd_client import Client, ConflictError, NotFoundError
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from promptd.api.routes import ROUTES
from promptd.cli import app
from promptd.settings import Settings
from promptd.tenancy.api_keys import new_key
from tests.api.conftest import LiveServer, serve

ADMIN_KEY = "the-first-admin-key"

OPEN = "open"
ACCESS: dict[tuple[str, str], str] = {
    ("POST", "/v1/completions"): "infer",
    ("POST", "/v1/chat/completions"): "infer",
    ("POST", "/v1/classify"): "infer",
    ("POST", "/v1/embeddings"): "infer",
    ("POST", "/tokenize"): "infer",
    ("POST", "/detokenize"): "infer",
    ("GET", "/v1/models"): "infer",
    ("GET", "/v1/models/{model:path}"): "infer",
    ("GET", "/v1/prompts"): "prompts:read",
    ("GET", "/v1/prompts/{name:path}/versions"): "prompts:read",
    ("GET", "/v1/prompts/{name:path}/content"): "prompts:read",
    ("GET", "/v1/prompts/{name:path}/neighbors"): "prompts:read",
    ("GET", "/v1/prompts/{name:path}/residency"): "prompts:read",
    ("GET", "/v1/prompts/{name:path}/shares"): "prompts:read",
    ("PUT", "/v1/prompts/{name:path}/shares/{tenant}"): "prompts:write",
    ("DELETE", "/v1/prompts/{name:path}/shares/{tenant}"): "prompts:write",
    ("POST", "/v1/prompts/{name:path}/evaluate"): "infer",
    ("POST", "/v1/prompts/{name:path}/rollback"): "prompts:write",
    ("PUT", "/v1/prompts/{name:path}"): "prompts:write",
    ("GET", "/v1/prompts/{name:path}"): "prompts:read",
    ("DELETE", "/v1/prompts/{name:path}"): "prompts:write",
    ("POST", "/v1/files"): "train",
    ("GET", "/v1/files"): "train",
    ("GET", "/v1/files/{file_id}"): "train",
    ("GET", "/v1/files/{file_id}/content"): "train",
    ("DELETE", "/v1/files/{file_id}"): "train",
    ("GET", "/v1/fine_tuning/methods"): "train",
    ("POST", "/v1/fine_tuning/jobs"): "train",
    ("GET", "/v1/fine_tuning/jobs"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): "train",
    ("DELETE", "/v1/fine_tuning/jobs/{job_id}"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): "train",
    ("POST", "/admin/training/jobs"): "admin",
    ("POST", "/admin/keys"): "admin",
    ("GET", "/admin/keys"): "admin",
    ("POST", "/admin/keys/{key_id}/rotate"): "admin",
    ("DELETE", "/admin/keys/{key_id}"): "admin",
    ("GET", "/admin/tenants"): "admin",
    ("GET", "/admin/tenants/{tenant}"): "admin",
    ("PATCH", "/admin/tenants/{tenant}"): "admin",
    ("GET", "/admin/quarantine"): "admin",
    ("DELETE", "/admin/quarantine/{tenant}/{version}"): "admin",
    ("DELETE", "/admin/tenants/{tenant}"): "admin",
    ("DELETE", "/v1/users/{user:path}"): "prompts:write + train",
    ("GET", "/admin/audit"): "admin",
    ("GET", "/admin/usage"): "admin",
    ("GET", "/v1/usage"): "infer",
    ("GET", "/admin/engine"): "admin",
    ("POST", "/admin/drain"): "admin",
    ("GET", "/admin/drain"): "admin",
    ("DELETE", "/admin/drain"): "admin",
    ("GET", "/admin/servers"): "admin",
    ("GET", "/livez"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/startupz"): OPEN,
    ("GET", "/health"): OPEN,
    ("GET", "/metrics"): OPEN,
    ("GET", "/version"): OPEN,
    ("GET", "/"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", "/ui"): OPEN,
    ("GET", "/ui/{path:path}"): OPEN,
}
"""What each route needs, said a second time: a route that is added or changed must be thought about here."""

SCOPES = ("infer", "prompts:read", "prompts:write", "train", "admin")


@dataclass(frozen=True)
class Caller:
    """One kind of caller."""

    authorization: str | None
    scopes: frozenset[str] | None
    """None: nobody."""

    @property
    def headers(self) -> dict[str, str]:
        """What it sends."""
        return {} if self.authorization is None else {"Authorization": self.authorization}


@pytest.fixture(scope="module")
def keyed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with one static tenant key and an admin's."""
    settings = Settings(
        model=str(tiny_models["llama"]),
        store=str(tmp_path_factory.mktemp("access")),
        api_keys=SecretStr("static:the-static-key"),
        admin_key=SecretStr(ADMIN_KEY),
        drain_seconds=0,
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live


@pytest.fixture(scope="module")
def callers(keyed: LiveServer) -> dict[str, Caller]:
    """Every kind: nobody in many ways, one scope each, the environment's keys."""
    with Client(keyed.url, api_key=ADMIN_KEY) as admin:
        revoked, expired = admin.keys.create("gone"), admin.keys.create("late", expires_in_seconds=0.05)
        admin.keys.revoke(revoked.id)
        good = admin.keys.create("good")
        single = {scope: admin.keys.create(f"only-{number}", scopes=[scope]) for number, scope in enumerate(SCOPES)}
    time.sleep(0.1)
    tenant_scopes = frozenset(SCOPES) - {"admin"}
    return {
        "no key": Caller(None, None),
        "empty": Caller("", None),
        "other scheme": Caller(f"Basic {good.key}", None),
        "key without scheme": Caller(good.key, None),
        "mistyped": Caller(f"Bearer {good.key[:-1]}!", None),
        "never issued": Caller(f"Bearer {new_key().text}", None),
        "static prefix": Caller("Bearer the-static-ke", None),
        "revoked": Caller(f"Bearer {revoked.key}", None),
        "expired": Caller(f"Bearer {expired.key}", None),
        **{f"only {scope}": Caller(f"Bearer {key.key}", frozenset({scope})) for scope, key in single.items()},
        "issued": Caller(f"Bearer {good.key}", tenant_scopes),
        "lower-case scheme": Caller(f"bearer {good.key}", tenant_scopes),
        "static": Caller("Bearer the-static-key", tenant_scopes),
        "static admin": Caller(f"Bearer {ADMIN_KEY}", frozenset(SCOPES)),
    }


def test_the_table_is_whole() -> None:
    """Every route has its row, with the scope that it is registered with."""
    assert {(route.method, route.path): " + ".join(route.scopes) for route in ROUTES} == ACCESS


OWNED = ("{model:path}", "{name:path}", "{file_id}", "{job_id}")
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("PUT", "/v1/prompts/{name:path}"): {"text": "x"},
    ("POST", "/v1/prompts/{name:path}/rollback"): {"to": 1},
    ("POST", "/v1/prompts/{name:path}/evaluate"): {"rows": [{"text": "a", "label": "b"}]},
}


@pytest.fixture(scope="module")
def owned(keyed: LiveServer) -> Iterator[tuple[httpx.Client, httpx.Client, dict[str, str]]]:
    """Two tenants, and what the first has: by the field of a path, its name for the second."""
    with Client(keyed.url, api_key=ADMIN_KEY) as admin:
        keys = [admin.keys.create(tenant).key for tenant in ("owner", "other")]
    with (
        keyed.http(Authorization=f"Bearer {keys[0]}") as owner,
        keyed.http(Authorization=f"Bearer {keys[1]}") as other,
    ):
        assert owner.put("/v1/prompts/thing", json={"text": "be kind"}).status_code == 201
        rows = b'{"prompt": "a", "completion": "b"}\n' * 4
        file = owner.post("/v1/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune"}).json()["id"]
        job = owner.post("/v1/fine_tuning/jobs", json={"model": "tiny-llama", "training_file": file}).json()["id"]
        yield owner, other, {OWNED[0]: "owner/thing", OWNED[1]: "owner/thing", OWNED[2]: file, OWNED[3]: job}


@pytest.mark.parametrize("route", [route for route in ACCESS if any(one in route[1] for one in OWNED)], ids=" ".join)
def test_what_is_anothers_is_absent(
    owned: tuple[httpx.Client, httpx.Client, dict[str, str]], route: tuple[str, str]
) -> None:
    """Byte for byte: what another tenant has, and what nobody has. Its owner (the control) finds it."""
    owner, other, names = owned
    method, path = route
    field = next(one for one in OWNED if one in path)
    absent = "owner/nothing" if "/" in names[field] else names[field][:-8] + "00000000"
    told = []
    for name in (names[field], absent):
        url = path.replace(field, name).replace("{tenant}", "other")
        answer = other.request(method, url, json=BODIES.get(route))
        told.append((answer.status_code, answer.text.replace(name, "NAME")))
    assert told[0] == told[1]
    assert told[0][0] == 404
    if method == "GET":
        assert owner.get(path.replace(field, names[field])).status_code in (200, 400)  # 400: a text has no neighbours


@pytest.mark.parametrize("route", ACCESS, ids=" ".join)
def test_every_route_against_every_caller(
    keyed: LiveServer, callers: dict[str, Caller], route: tuple[str, str]
) -> None:
    """401 without a good key, 403 without the scope, both before the body is looked at; open routes are open."""
    method, path = route
    url = path
    for field in ("{model:path}", "{name:path}", "{file_id}", "{job_id}", "{key_id}", "{tenant}", "{user:path}"):
        url = url.replace(field, "absent")
    url = url.replace("{path:path}", "app.js")
    options: dict[str, Any] = {"follow_redirects": url in ("/", "/docs", "/ui")}
    if method in ("POST", "PUT", "PATCH"):
        options["content"] = b"{broken"
    with keyed.http() as http:
        answers = {
            name: http.request(method, url, headers=caller.headers, **options) for name, caller in callers.items()
        }
    for name, caller in callers.items():
        answer = answers[name]
        if ACCESS[route] == OPEN:
            assert answer.status_code == 200, name
        elif caller.scopes is None:
            assert answer.status_code == 401, name
            assert answer.headers["www-authenticate"] == "Bearer"
        elif not caller.scopes.issuperset(ACCESS[route].split(" + ")):
            assert answer.status_code == 403, name
            assert answer.json()["error"]["code"] == "insufficient_scope"
        else:
            assert answer.status_code not in (401, 403, 500), (name, answer.text)


@pytest.mark.parametrize(
    "path",
    [
        "//admin/keys",
        "/admin//keys",
        "/admin/keys/",
        "/%61dmin/keys",
        "/v1/../admin/keys",
        "/ADMIN/keys",
        "/admin/keys;x",
    ],
)
def test_no_path_leads_around(keyed: LiveServer, callers: dict[str, Caller], path: str) -> None:
    """However the path is written: never an answer from behind it without the scope. The admin gets through."""
    url = httpx.URL(keyed.url)
    for name in ("no key", "issued"):
        headers = {"Authorization": callers[name].authorization or "", "Host": "localhost"}
        raw = httpx.Request("GET", url.copy_with(raw_path=path.encode()), headers=headers)
        with httpx.Client() as http:
            assert http.send(raw).status_code in (307, 401, 403, 404)
    with keyed.http(Authorization=f"Bearer {ADMIN_KEY}", Host="admin.example") as http:  # control
        assert http.get("/admin/keys").status_code == 200


def test_a_key_from_its_making_to_its_end(keyed: LiveServer) -> None:
    """Issued, used, rotated, revoked, over HTTP; the text is in one answer only."""
    with Client(keyed.url, api_key=ADMIN_KEY, max_retries=0) as admin:
        first = admin.keys.create("life", label="web")
        assert set(first.scopes) == set(SCOPES) - {"admin"}
        with Client(keyed.url, api_key=first.key) as tenant:
            assert len(tenant.models()) == 1
        second = admin.keys.rotate(first.id, grace_seconds=0)
        listed = {key.id: key for key in admin.keys.list("life")}
        assert {key.state for key in listed.values()} == {"active", "expired"}
        assert (listed[second.id].label, listed[second.id].state) == ("web", "active")
        assert first.key not in str(admin.keys.list()) and second.key not in str(admin.keys.list())
        assert admin.keys.revoke(second.id).state == "revoked"
        with keyed.http(Authorization=f"Bearer {second.key}") as http:  # here at once, no waiting
            assert http.get("/v1/models").status_code == 401
        with pytest.raises(NotFoundError) as absent:
            admin.keys.revoke("nobody")
        assert absent.value.code == "key_not_found"
        for _ in range(2):
            admin.keys.create("full")
        with pytest.raises(ConflictError) as full:
            admin.keys.create("full")
        assert full.value.code == "too_many_keys"


def test_what_admins_did_can_be_read(keyed: LiveServer) -> None:
    """In order, page by page, of one tenant or all; a tenant whose name begins the same is another; nothing secret."""
    with (
        Client(keyed.url, api_key=ADMIN_KEY) as admin,
        keyed.http(Authorization=f"Bearer {ADMIN_KEY}") as http,
    ):
        issued = admin.keys.create("seen")
        admin.keys.create("seen-too")
        admin.tenants.set("seen", weight=3)
        admin.tenants.set("seen", weight=3)  # changes nothing
        admin.keys.revoke(issued.id)
        answer = http.get("/admin/audit", params={"tenant": "seen"})
        listed = answer.json()
        assert [one["action"] for one in listed["data"]] == ["key.issued", "limits.set", "key.revoked"]
        assert {one["by"] for one in listed["data"]} == {"default/static-admin"}
        assert listed["data"][1]["details"] == {"weight": 3.0}
        assert (listed["intact"], listed["has_more"]) == (True, False)
        assert issued.key not in answer.text
        paged: list[object] = []
        after, more = 0, True
        while more:
            page = http.get("/admin/audit", params={"tenant": "seen", "limit": 2, "after": after}).json()
            paged += page["data"]
            after, more = page["data"][-1]["seq"], page["has_more"]
        assert paged == listed["data"]
        everybody = http.get("/admin/audit", params={"limit": 1000}).json()
        assert everybody["intact"] is None
        assert {"seen", "seen-too"} <= {one["tenant"] for one in everybody["data"]}


def test_an_open_server_makes_no_keys(server: LiveServer) -> None:
    """It would lock its maker out."""
    with server.http() as http:
        answer = http.post("/admin/keys", json={"tenant": "acme"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "server_is_open")
        assert http.get("/v1/models").status_code == 200


def test_issued_keys_close_a_server(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Started again without any key of the environment, over a store with issued ones, nobody comes in without one."""
    folder = tiny_models["llama"]
    closed = Settings(model=str(folder), store=str(tmp_path), admin_key=SecretStr(ADMIN_KEY), drain_seconds=0)
    with serve(closed, folder) as live, Client(live.url, api_key=ADMIN_KEY) as admin:
        key = admin.keys.create("acme").key
    again = Settings(model=str(folder), store=str(tmp_path), drain_seconds=0)
    with serve(again, folder) as live:
        with live.http() as http:
            assert http.get("/v1/models").status_code == 401
        with live.http(Authorization=f"Bearer {key}") as http:
            assert http.get("/v1/models").status_code == 200


def test_keys_from_the_command_line(keyed: LiveServer) -> None:
    """`promptd keys`: the key alone on stdout, so that a script can take it."""

    def promptd(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["keys", *arguments, "--url", keyed.url, "--api-key", ADMIN_KEY])

    made = promptd("create", "shell", "-s", "infer", "--days", "1")
    key = made.stdout.strip()
    with keyed.http(Authorization=f"Bearer {key}") as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/v1/prompts").status_code == 403
    key_id = key.split("_")[1]
    assert key_id in promptd("ls", "shell").stdout
    rotated = promptd("rotate", key_id, "--grace-hours", "0").stdout.strip()
    assert promptd("revoke", rotated.split("_")[1]).exit_code == 0
    for ended in (key, rotated):
        with keyed.http(Authorization=f"Bearer {ended}") as http:
            assert http.get("/v1/models").status_code == 401
    wrong = promptd("create", "shell", "-s", "everything")
    assert wrong.exit_code == 1
    assert "scopes" in wrong.stderr
