"""Erasing over HTTP, on two servers over one store: refused, forgotten and gone from the disk."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from promptd_client import Client, ConflictError
from pydantic import SecretStr
from typer.testing import CliRunner

from promptd.cli import app
from promptd.settings import Settings
from tests.api.conftest import ADMIN_KEY, MODEL, LiveServer, serve
from tests.engine.harness import library
from tests.patience import until

CANARY = "canary-5d21e8"
ROWS = b"".join(json.dumps({"prompt": f"{CANARY} {n}", "completion": " yes"}).encode() + b"\n" for n in range(9))
STATIC_KEY = "a-key-of-the-environment"


@dataclass
class Pair:
    """Two servers, the folder of their store, an admin."""

    here: LiveServer
    there: LiveServer
    folder: Path
    admin: Client


@pytest.fixture(scope="module")
def pair(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Over one folder, as two processes would be."""
    folder, model = tmp_path_factory.mktemp("erasing"), tiny_models["llama"]
    settings = Settings(
        model=str(model),
        store=str(folder),
        admin_key=SecretStr(ADMIN_KEY),
        api_keys=SecretStr(f"static:{STATIC_KEY}"),
        drain_seconds=0,
        training="worker",
    )
    with (
        serve(settings, model) as here,
        serve(settings, model) as there,
        Client(here.url, api_key=ADMIN_KEY, max_retries=0) as admin,
    ):
        yield Pair(here, there, folder, admin)


def on_disk(folder: Path) -> list[str]:
    """Files that hold the canary, by content or name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]


def resident(server: LiveServer) -> int:
    """Prompts that the server's engine has in memory."""
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("promptd_prompts_resident "))))


def fill(server: LiveServer, key: str, user: str | None = None) -> str:
    """Give a tenant prompts, a file and a job with the canary; return the file's id."""
    params = {} if user is None else {"user": user}
    with server.http(Authorization=f"Bearer {key}") as http:
        text = {"text": f"You are {CANARY}."}
        assert http.put("/v1/prompts/persona", json=text, params=params).status_code == 201
        assert http.put("/v1/prompts/soft", content=library(server.folder)[0].content, params=params).status_code == 201
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as sdk:
        file = sdk.files.create(file=(f"{CANARY}.jsonl", ROWS), purpose="fine-tune", extra_body=params)
        sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="learned")
    return file.id


def ask(server: LiveServer, key: str, model: str = "persona") -> httpx.Response:
    """Use a prompt."""
    with server.http(Authorization=f"Bearer {key}") as http:
        return http.post("/v1/completions", json={"model": model, "prompt": list(range(5, 40)), "max_tokens": 2})


def test_a_tenant_is_refused_at_once_and_gone_everywhere(pair: Pair) -> None:
    """Its keys end on both servers, its keys and values leave both engines, its bytes the disk; others go on."""
    key, other = pair.admin.keys.create("acme").key, pair.admin.keys.create("other").key
    fill(pair.here, key)
    fill(pair.there, other)
    for server in (pair.here, pair.there):
        assert ask(server, key).status_code == ask(server, other).status_code == 200
    before = resident(pair.here), resident(pair.there)  # with what was looked at when it was uploaded
    assert len(on_disk(pair.folder)) >= 3  # the control
    with pytest.raises(ConflictError):
        pair.admin.tenants.erase("default")  # one's own
    report = pair.admin.tenants.erase("acme")
    began = time.monotonic()
    print(report)
    counts = {"keys": 1, "prompts": 2, "versions": 2, "files": 1, "jobs": 1}
    assert {name: report[name] for name in counts} == counts
    assert ask(pair.here, key).status_code == 401  # here with the next request
    until(lambda: ask(pair.there, key).status_code == 401)
    print(f"refused by the other server after {time.monotonic() - began:.2f} s")
    assert report["resident_prompts"] >= 1
    assert resident(pair.here) == before[0] - report["resident_prompts"]
    until(lambda: resident(pair.there) == before[1] - 1)  # nothing of it was uploaded there
    for server in (pair.here, pair.there):
        assert ask(server, other).status_code == 200
        with server.http(Authorization=f"Bearer {other}") as http:  # what acme was served last is in nobody's way
            assert http.get("/v1/usage").raise_for_status().json()["total"]["requests"] >= 2
    for again in (lambda: pair.admin.keys.create("acme"), lambda: pair.admin.tenants.set("acme", weight=2)):
        with pytest.raises(ConflictError) as refused:
            again()
        assert refused.value.code == "tenant_erased"
    assert pair.admin.tenants.get("acme").erased is not None
    assert not any(count for name, count in pair.admin.tenants.erase("acme").items() if name != "is_out_of_files")
    assert pair.admin.tenants.erase("other")["prompts"] == 2
    until(lambda: _erased(pair) and on_disk(pair.folder) == [])


def _erased(pair: Pair) -> bool:
    """Take what is left out of the log of writes: a server that reads it at that moment keeps it a little longer."""
    return bool(pair.admin.tenants.erase("other")["is_out_of_files"])


def test_a_key_of_the_environment_ends_with_its_tenant(pair: Pair) -> None:
    """It is in no store; its tenant is."""
    assert ask(pair.there, STATIC_KEY, MODEL).status_code == 200
    pair.admin.tenants.erase("static")
    assert ask(pair.here, STATIC_KEY, MODEL).status_code == 401
    until(lambda: ask(pair.there, STATIC_KEY, MODEL).status_code == 401)


def test_a_user_is_gone(pair: Pair) -> None:
    """From the command line: prompts, file and job of one person, on both servers; another's and the tenant's stay."""
    key = pair.admin.keys.create("house").key
    fill(pair.here, key, user="ann/1")
    with Client(pair.here.url, api_key=key, max_retries=0) as client:
        client.prompts.upload_text("own", "no one's")
        client.prompts.upload_text("note", "his", user="bob")
        client.prompts.upload("file", library(pair.here.folder)[1].content, user="bob")
        assert client.erase_user("bob")["prompts"] == 2
    for server in (pair.here, pair.there):
        assert ask(server, key).status_code == ask(server, key, "own").status_code == 200
    before = resident(pair.there)
    done = CliRunner().invoke(app, ["users", "erase", "ann/1", "-y", "--url", pair.here.url, "--api-key", key])
    assert done.stdout.splitlines()[0] == "erased user ann/1", done.stderr
    assert "2 prompts, 2 versions, 1 files, 1 jobs" in done.stdout
    for server in (pair.here, pair.there):
        assert ask(server, key).status_code == 404
        assert ask(server, key, "own").status_code == 200
    until(lambda: resident(pair.there) == before - 1)
    with pair.here.http(Authorization=f"Bearer {key}") as http:
        assert [one["id"] for one in http.get("/v1/prompts").json()["data"]] == ["own"]
        assert http.get("/v1/files").json()["data"] == [] == http.get("/v1/fine_tuning/jobs").json()["data"]
    until(lambda: _again(pair, key) and on_disk(pair.folder) == [])
    entries = [one for one in _deeds(pair, "house") if one["action"] == "user.erased"]
    assert len(entries) >= 1
    assert "ann/1" not in json.dumps(entries)
    only = pair.admin.keys.create("house", scopes=["prompts:write"]).key
    with pair.here.http(Authorization=f"Bearer {only}") as http:  # files and jobs go too: both scopes are needed
        assert http.delete("/v1/users/ann").status_code == 403


def _again(pair: Pair, key: str) -> bool:
    with Client(pair.here.url, api_key=key) as client:
        return bool(client.erase_user("ann/1")["is_out_of_files"])


def _deeds(pair: Pair, tenant: str, kind: str = "deeds") -> list[dict[str, object]]:
    with pair.here.http(Authorization=f"Bearer {ADMIN_KEY}") as http:
        answer = http.get("/admin/audit", params={"tenant": tenant, "kind": kind, "limit": 1000})
    found: list[dict[str, object]] = answer.json()["data"]
    return found


def test_a_prompt_and_a_file(pair: Pair) -> None:
    """With `erase` their bytes go at once; without (the control) they wait for the clean-up."""
    key = pair.admin.keys.create("single").key
    file_id = fill(pair.here, key)
    blobs = pair.folder / "blobs" / "single"

    def num_blobs() -> int:
        return sum(1 for path in blobs.glob("*/*") if path.is_file())

    with pair.here.http(Authorization=f"Bearer {key}") as http:
        assert ask(pair.there, key).status_code == 200
        before, held = num_blobs(), resident(pair.there)
        assert http.delete("/v1/prompts/soft").status_code == 200
        assert num_blobs() == before
        erased = http.delete("/v1/prompts/persona", params={"erase": "true"}).json()["erased"]
        assert (erased["versions"], erased["blobs"], num_blobs()) == (1, 1, before - 1)
        until(lambda: resident(pair.there) == held - 1)
        erased = http.delete(f"/v1/files/{file_id}", params={"erase": "true"}).json()["erased"]
        assert (erased["blobs"], num_blobs()) == (1, before - 2)
        assert http.delete("/v1/prompts/persona", params={"erase": "true"}).status_code == 404
        assert http.delete(f"/v1/files/{file_id}", params={"erase": "true"}).status_code == 404


def test_every_call_that_changes_something_is_written_down(pair: Pair) -> None:
    """Before it is answered, with who and what, not with what was in it; reading and failing calls are not."""
    issued = pair.admin.keys.create("clerk")
    with pair.here.http(Authorization=f"Bearer {issued.key}") as http:
        text = {"text": CANARY}
        assert http.put("/v1/prompts/one", json=text).status_code == 201
        assert http.put("/v1/prompts/one/shares/friend").status_code == 200
        assert http.put("/v1/prompts/two", content=b"broken").status_code == 422
        assert http.get("/v1/prompts/one").status_code == 200
        assert http.post("/v1/completions", json={"model": "one", "prompt": [5], "max_tokens": 1}).status_code == 200
        assert http.delete("/v1/prompts/one").status_code == 200
    found = _deeds(pair, "clerk", "calls")
    assert [(one["action"], one["status"], one["target"]) for one in found] == [
        ("PUT /v1/prompts/{name:path}", 201, {"name": "one"}),
        ("PUT /v1/prompts/{name:path}/shares/{tenant}", 200, {"name": "one", "tenant": "friend"}),
        ("DELETE /v1/prompts/{name:path}", 200, {"name": "one"}),
    ]
    assert {one["by"] for one in found} == {f"clerk/{issued.id}"}
    assert CANARY not in json.dumps(found)


def test_refused_calls_are_counted(pair: Pair) -> None:
    """A flood is one entry with its number; whose key it was is told where it was a good one."""
    issued = pair.admin.keys.create("curious", scopes=["infer"])
    with pair.here.http(Authorization=f"Bearer {issued.key}") as http:
        for _ in range(30):
            assert http.get("/admin/keys").status_code == 403
        assert http.put("/v1/prompts/one", json={"text": "x"}).status_code == 403
    told = _deeds(pair, "curious", "calls")
    assert len(told) <= 3  # what was counted is written down every ten seconds, perhaps amid the flood
    counts = Counter[str]()
    for one in told:
        assert (one["status"], one["by"]) == (403, f"curious/{issued.id}")
        counts[one["action"]] += one["count"]
    assert counts == {"GET /admin/keys": 30, "PUT /v1/prompts/{name:path}": 1}
    with pair.here.http(Authorization="Bearer nobody") as http:
        for _ in range(20):
            assert http.get("/v1/models").status_code == 401
    with pair.here.http(Authorization=f"Bearer {ADMIN_KEY}") as http:
        everybody = http.get("/admin/audit", params={"kind": "calls", "limit": 1000}).json()["data"]
    strangers = [one for one in everybody if one["action"] == "GET /v1/models" and one["status"] == 401]
    assert sum(one["count"] for one in strangers) == 20
    assert {(one["tenant"], one["by"]) for one in strangers} == {("", "")}


def test_a_server_that_is_drained(pair: Pair) -> None:
    """What changes a server and no tenant is written down too, as the deed of whose key it was."""
    with pair.here.http(Authorization=f"Bearer {ADMIN_KEY}") as http:
        assert http.post("/admin/drain").status_code == http.delete("/admin/drain").status_code == 200
        assert http.get("/admin/drain").status_code == 200
    told = [(one["action"], one["by"]) for one in _deeds(pair, "default", "calls") if "drain" in str(one["action"])]
    assert told == [("POST /admin/drain", "default/static-admin"), ("DELETE /admin/drain", "default/static-admin")]
