"""Sharing over HTTP: who may do what with another's prompt, who pays, and what is withdrawn."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import openai
import pytest
from promptd_client import Client, ConflictError, InvalidRequestError, NotFoundError
from typer.testing import CliRunner

from promptd.cli import app
from tests.api.conftest import MODEL, LiveServer
from tests.engine.harness import library

ASK = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}


@dataclass
class Houses:
    """Tenants, and their keys."""

    owner: str
    grantee: str
    stranger: str


@pytest.fixture(scope="module")
def houses(tenanted: LiveServer, admin: Client) -> Houses:
    """`lender` shares `tone` with `borrower`; `stranger` has a prompt of the same name."""
    keys = Houses(*(admin.keys.create(name).key for name in ("lender", "borrower", "stranger")))
    files = [artifact.content for artifact in library(tenanted.folder)]
    with Client(tenanted.url, api_key=keys.owner) as owner, Client(tenanted.url, api_key=keys.stranger) as stranger:
        owner.prompts.upload("tone", files[0])
        owner.prompts.upload("tone", files[1])
        stranger.prompts.upload("tone", files[2])
        owner.prompts.share("tone", "borrower")
        assert owner.prompts.shares("tone") == ["borrower"]
    return keys


def http(server: LiveServer, key: str) -> httpx.Client:
    """A plain client."""
    return server.http(Authorization=f"Bearer {key}")


def test_a_grantee_uses_and_reads(tenanted: LiveServer, admin: Client, houses: Houses) -> None:
    """Inference by every way of naming, reading by every route; counted for the grantee alone."""
    with http(tenanted, houses.grantee) as bob, http(tenanted, houses.owner) as alice:
        own = alice.post("/v1/completions", json={**ASK, "model": "tone"}).json()
        for named in (
            {"model": "lender/tone"},
            {"model": f"{MODEL}:lender/tone"},
            {"prompt_id": "lender/tone@2"},
            {"prompt_ids": ["lender/tone"]},
        ):
            answer = bob.post("/v1/completions", json={**ASK, **named})
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == own["choices"][0]["text"]
        for path in ("", "/versions", "/content", "/content?format=peft", "/neighbors", "/residency"):
            assert bob.get(f"/v1/prompts/lender/tone{path}").status_code == 200, path
        assert bob.get("/v1/prompts/lender/tone@1").json()["number"] == 1
        assert [one["id"] for one in bob.get("/v1/prompts").json()["data"]] == ["lender/tone"]
        assert "lender/tone" in {one["id"] for one in bob.get("/v1/models").json()["data"]}
        sdk = openai.OpenAI(base_url=f"{tenanted.url}/v1", api_key=houses.grantee, max_retries=0)
        with sdk:
            assert sdk.completions.create(model="lender/tone", prompt=[5, 6], max_tokens=1).usage is not None
    billed = {entry.prompt: entry.requests for entry in admin.tenants.usage("borrower").data}
    assert billed == {"lender/tone": 5}
    assert [entry.requests for entry in admin.tenants.usage("lender").data if entry.requests] == [1]


def test_a_grantee_never_writes(tenanted: LiveServer, houses: Houses) -> None:
    """Every writing route answers a grantee as it answers somebody who asks for a prompt that is not there."""
    content = library(tenanted.folder)[3].content
    for method, path, body in (
        ("PUT", "", content),
        ("DELETE", "", None),
        ("POST", "/rollback", b'{"to": 1}'),
        ("GET", "/shares", None),
        ("PUT", "/shares/stranger", None),
        ("DELETE", "/shares/borrower", None),
    ):
        told = []
        for owner in ("lender", "absentee"):
            with http(tenanted, houses.grantee) as bob:
                headers = {"Content-Type": "application/json"} if path == "/rollback" else {}
                answer = bob.request(method, f"/v1/prompts/{owner}/tone{path}", content=body, headers=headers)
            told.append((answer.status_code, answer.text.replace(owner, "OWNER")))
        assert told[0] == told[1]
        assert told[0][0] == 404
    with Client(tenanted.url, api_key=houses.owner) as owner_client:
        assert (owner_client.prompts.get("tone").number, owner_client.prompts.shares("tone")) == (2, ["borrower"])


def test_strangers_see_nothing(tenanted: LiveServer, houses: Houses) -> None:
    """Byte for byte what is told of a prompt of a tenant that does not exist; the grantee (the control) sees it."""
    for method, path in (
        ("GET", "/v1/prompts/OWNER/tone"),
        ("GET", "/v1/prompts/OWNER/tone/versions"),
        ("GET", "/v1/prompts/OWNER/tone/content"),
        ("GET", "/v1/prompts/OWNER/tone/shares"),
        ("GET", "/v1/models/OWNER/tone"),
        ("POST", "/v1/completions"),
    ):
        told, seen = [], []
        for key in (houses.stranger, houses.grantee):
            for owner in ("lender", "absentee"):
                with http(tenanted, key) as client:
                    body = {**ASK, "model": f"{owner}/tone"} if method == "POST" else None
                    answer = client.request(method, path.replace("OWNER", owner), json=body)
                (told if key == houses.stranger else seen).append(
                    (answer.status_code, answer.text.replace(owner, "OWNER"))
                )
        assert told[0] == told[1], path
        assert told[0][0] == 404
        assert (seen[0][0] == 200) == (not path.endswith("/shares"))


def test_scopes_hold_for_shared_prompts(tenanted: LiveServer, admin: Client, houses: Houses) -> None:
    """A key for inference alone does not read what is shared, a key for reading alone does not ask it."""
    infer = admin.keys.create("borrower", scopes=["infer"]).key
    with http(tenanted, infer) as client:
        assert client.post("/v1/completions", json={**ASK, "model": "lender/tone"}).status_code == 200
        assert client.get("/v1/prompts/lender/tone/content").status_code == 403
    with http(tenanted, houses.owner) as owner:
        assert owner.put("/v1/prompts/tone/shares/lender").status_code == 400
        assert owner.put("/v1/prompts/tone/shares/public").status_code == 400
        assert owner.put("/v1/prompts/absent/shares/borrower").status_code == 404


def test_withdrawn(tenanted: LiveServer, houses: Houses) -> None:
    """With the next request; a deleted prompt of the same name is shared with nobody."""
    with (
        Client(tenanted.url, api_key=houses.owner) as owner,
        Client(tenanted.url, api_key=houses.grantee, max_retries=0) as bob,
    ):
        owner.prompts.upload("brief", library(tenanted.folder)[0].content)
        owner.prompts.share("brief", "borrower")
        assert bob.complete([5, 6], model="lender/brief", max_tokens=1)
        owner.prompts.unshare("brief", "borrower")
        with pytest.raises(NotFoundError):
            bob.complete([5, 6], model="lender/brief", max_tokens=1)
        with pytest.raises(NotFoundError):
            bob.prompts.get("lender/brief")


def test_what_stands_behind_another_is_shared_after_it(tenanted: LiveServer, houses: Houses) -> None:
    """Else the grantee would be given a chain whose beginning it may not use."""
    files = [artifact.content for artifact in library(tenanted.folder)]
    with (
        Client(tenanted.url, api_key=houses.owner) as owner,
        Client(tenanted.url, api_key=houses.grantee, max_retries=0) as bob,
    ):
        owner.prompts.upload("task", files[0])
        owner.prompts.upload("user", files[1], behind=["task"])
        with pytest.raises(ConflictError, match="share that first"):
            owner.prompts.share("user", "borrower")
        owner.prompts.share("task", "borrower")
        owner.prompts.share("user", "borrower")
        assert bob.complete([5, 6], model="lender/user", max_tokens=1)
        owner.prompts.unshare("task", "borrower")
        with pytest.raises((ConflictError, InvalidRequestError)):
            bob.complete([5, 6], model="lender/user", max_tokens=1)


def test_from_the_command_line(tenanted: LiveServer, houses: Houses) -> None:
    """`promptd prompts share | unshare | ls`."""

    def promptd(key: str, *arguments: str) -> str:
        done = CliRunner().invoke(app, ["prompts", *arguments, "--url", tenanted.url, "--api-key", key])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    assert promptd(houses.owner, "share", "tone", "--with", "x", "--with", "y") == (
        "tone is shared with borrower, x, y\n"
    )
    assert promptd(houses.owner, "unshare", "tone", "--with", "x", "--with", "y") == "tone is shared with borrower\n"
    assert "(shared)" in promptd(houses.grantee, "ls")
