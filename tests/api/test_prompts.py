"""Prompts over HTTP: versions and conditions, PEFT's files in and out, dry runs, owners, pages."""

from __future__ import annotations

import base64
import io
import json
import zipfile

import httpx
import torch
from promptd_store import PromptArtifact, encode
from safetensors.torch import save

from tests.api.conftest import MODEL, LiveServer
from tests.api.test_contract import GOOD


def test_versions_rollback_and_preconditions(server: LiveServer, prompts: tuple[PromptArtifact, ...]) -> None:
    """Upload makes versions, If-Match guards, rollback moves the pointer back, delete ends it all."""
    with server.http() as http:
        first = http.put("/v1/prompts/v", content=prompts[0].content, headers={"If-None-Match": "*"})
        assert first.status_code == 201
        again = http.put("/v1/prompts/v", content=prompts[1].content, headers={"If-None-Match": "*"})
        assert (again.status_code, again.json()["error"]["code"]) == (412, "precondition_failed")
        second = http.put("/v1/prompts/v", content=prompts[1].content, headers={"If-Match": first.headers["etag"]})
        assert second.json()["number"] == 2
        stale = http.put("/v1/prompts/v", content=prompts[2].content, headers={"If-Match": first.headers["etag"]})
        assert stale.status_code == 412
        assert http.get("/v1/prompts/v").json()["version"] == prompts[1].version
        assert http.get("/v1/prompts/v@1").json()["version"] == prompts[0].version
        rolled = http.post("/v1/prompts/v/rollback", json={"to": 1})
        assert rolled.json()["version"] == prompts[0].version
        wrong = http.post("/v1/prompts/v/rollback", json={"to": "1st"}).json()["error"]
        assert (wrong["code"], wrong["param"]) == ("invalid_prompt_name", "to")
        weak = http.put(
            "/v1/prompts/v", content=prompts[2].content, headers={"If-Match": "W/" + rolled.headers["etag"]}
        )
        assert weak.status_code == 412
        answer = http.post("/v1/completions", json={**GOOD, "model": "v"})
        assert answer.json()["prompt_versions"] == [prompts[0].version]
        assert http.delete("/v1/prompts/v").json()["deleted"] is True
        assert http.get("/v1/prompts/v").status_code == 404
        assert http.post("/v1/completions", json={**GOOD, "model": "v"}).status_code == 404


def test_peft_in_and_out(server: LiveServer) -> None:
    """A PEFT file with its config in a header comes back bit for bit, also as a folder in a zip."""
    hidden = server.model.spec.hidden_size
    weights = save({"prompt_embeddings": torch.randn(4, hidden)}, {"format": "pt"})
    config = json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": hidden}).encode()
    header = base64.urlsafe_b64encode(config).decode()
    with server.http() as http:
        put = http.put("/v1/prompts/peft", content=weights, headers={"X-Promptd-Adapter-Config": header})
        assert put.status_code == 201, put.text
        assert put.json()["kind"] == "soft"
        assert http.get("/v1/prompts/peft/content").content == weights
        archive = zipfile.ZipFile(io.BytesIO(http.get("/v1/prompts/peft/content?format=peft").content))
        assert archive.read("adapter_model.safetensors") == weights
        assert archive.read("adapter_config.json") == config
        near = http.get("/v1/prompts/peft/neighbors?count=3").json()
        assert len(near["data"]) == 4 and len(near["data"][0]["neighbors"]) == 3
        assert http.get("/v1/prompts/p4/neighbors").status_code == 400


def test_dry_run_checks_and_stores_nothing(two_tenants: LiveServer) -> None:
    """With `dry_run` an upload gets the errors and the version that it would get, and the name stays free."""
    good = encode("soft", torch.full((2, two_tenants.model.spec.hidden_size), 0.5))
    wide = encode("soft", torch.ones(2, two_tenants.model.spec.hidden_size + 1))
    with two_tenants.http(Authorization="Bearer key-tenant-a") as http:
        checked = http.put("/v1/prompts/tried?dry_run=true", content=good.content)
        assert (checked.status_code, checked.json()["object"]) == (200, "prompt.check")
        assert (checked.json()["version"], checked.json()["num_virtual_tokens"]) == (good.version, 2)
        assert http.get("/v1/prompts/tried").status_code == 404
        for name, content, status, param in (
            ("tried", wide.content, 422, "prompt_embeddings"),
            (MODEL, good.content, 409, "name"),
            ("a b", good.content, 400, "name"),
        ):
            dry, wet = (http.put(f"/v1/prompts/{name}{query}", content=content) for query in ("?dry_run=true", ""))
            assert dry.status_code == wet.status_code == status
            assert dry.json() == wet.json()
            assert dry.json()["error"]["param"] == param
        late = http.put("/v1/prompts/tried?dry_run=true", content=good.content, headers={"If-Match": '"x"'})
        assert late.status_code == 412
        assert http.put("/v1/prompts/tried", content=good.content).json()["version"] == good.version
        assert http.delete("/v1/prompts/tried").status_code == 200


def test_owner_and_name(two_tenants: LiveServer) -> None:
    """`owner/name` reads one's own and others' public prompts by every route; all else looks absent."""
    spec = two_tenants.model.spec
    one, other = (encode("soft", torch.full((2, spec.hidden_size), value)).content for value in (1.0, 2.0))
    with (
        two_tenants.http(Authorization="Bearer key-tenant-a") as a,
        two_tenants.http(Authorization="Bearer key-tenant-b") as b,
        two_tenants.http(Authorization="Bearer key-admin-1") as admin,
    ):
        assert admin.put("/v1/prompts/shown?visibility=public", content=one).status_code == 201
        assert admin.put("/v1/prompts/hidden", content=one).status_code == 201
        assert a.put("/v1/prompts/a/shown", content=other).status_code == 201
        for name, content in (("default/shown", one), ("a/shown", other), ("shown", other), ("shown@1", other)):
            assert a.get(f"/v1/prompts/{name}/content").content == content
            assert a.get(f"/v1/prompts/{name}").json()["id"] == ("shown" if content == other else name)
            if "@" not in name:
                assert len(a.get(f"/v1/prompts/{name}/versions").json()["data"]) == 1
            assert len(a.get(f"/v1/prompts/{name}/neighbors").json()["data"]) == 2
        assert b.get("/v1/prompts/shown").json()["id"] == "default/shown"
        for what in ("", "@1", "/versions", "/content", "/neighbors", "/residency"):
            hidden, absent = (b.get(f"/v1/prompts/default/{name}{what}") for name in ("hidden", "absent"))
            assert hidden.status_code == absent.status_code == 404
            assert hidden.text.replace("hidden", "absent") == absent.text
        for method, what, body in (
            ("PUT", "", {"content": one}),
            ("DELETE", "", {}),
            ("POST", "/rollback", {"json": {"to": 1}}),
        ):
            foreign = {a.request(method, f"/v1/prompts/default/{name}{what}", **body) for name in ("shown", "none")}
            assert {answer.status_code for answer in foreign} == {404}
            assert len({answer.text.replace("shown", "none") for answer in foreign}) == 1
        assert admin.get("/v1/prompts/shown").status_code == 200  # control: nothing happened to it
        assert a.delete("/v1/prompts/a/shown").status_code == 200
        assert a.get("/v1/prompts/shown").json()["owned_by"] == "default"
        assert b.get("/v1/prompts/b/c/d").json()["error"]["code"] == "invalid_prompt_name"


def test_pages_do_not_repeat_or_skip(two_tenants: LiveServer) -> None:
    """An own and a public prompt of one name are two entries; a cursor whose prompt is gone still holds its place."""
    content = encode("soft", torch.ones(2, two_tenants.model.spec.hidden_size)).content
    with (
        two_tenants.http(Authorization="Bearer key-tenant-b") as b,
        two_tenants.http(Authorization="Bearer key-admin-1") as admin,
    ):
        for name in ("page-1", "page-2"):
            assert b.put(f"/v1/prompts/{name}", content=content).status_code == 201
            assert admin.put(f"/v1/prompts/{name}?visibility=public", content=content).status_code == 201
        whole = [one["id"] for one in b.get("/v1/prompts").json()["data"]]
        assert {"page-1", "page-2", "default/page-1", "default/page-2"} <= set(whole)
        seen: list[str] = []
        while True:
            after = {"after": seen[-1]} if seen else {}
            page = b.get("/v1/prompts", params={"limit": 1, **after}).json()
            seen += [one["id"] for one in page["data"]]
            if not page["has_more"]:
                break
            assert len(seen) < len(whole)
        assert seen == whole
        assert b.delete("/v1/prompts/page-1").status_code == 200
        rest = b.get("/v1/prompts", params={"after": "page-1"}).json()["data"]
        assert [one["id"] for one in rest] == whole[whole.index("page-1") + 1 :]
        assert b.get("/v1/prompts", params={"after": "a b"}).json()["error"]["param"] == "after"
        found = b.get("/v1/prompts", params={"search": "AGE-2"}).json()["data"]
        assert [one["id"] for one in found] == [one for one in whole if "age-2" in one]
        last = b.get("/v1/prompts", params={"search": "page", "after": found[-1]["id"]}).json()
        assert last == {"object": "list", "data": [], "has_more": False}
        for name in ("page-1", "page-2"):
            assert admin.delete(f"/v1/prompts/{name}").status_code == 200


def test_residency_is_the_callers_own(two_tenants: LiveServer) -> None:
    """A prompt's K/V to the byte once it is used; what others hold of the same content shows nobody anything."""
    artifact = encode("soft", torch.full((3, two_tenants.model.spec.hidden_size), 0.25))
    size = 3 * two_tenants.model.bytes_per_slot
    with (
        two_tenants.http(Authorization="Bearer key-tenant-a") as a,
        two_tenants.http(Authorization="Bearer key-tenant-b") as b,
        two_tenants.http(Authorization="Bearer key-admin-1") as admin,
    ):

        def held(http: httpx.Client, name: str) -> int:
            told = http.get(f"/v1/prompts/{name}/residency").json()
            assert (told["object"], told["version"]) == ("prompt.residency", artifact.version)
            return int(told["num_bytes"])

        assert a.put("/v1/prompts/kept", content=artifact.content).status_code == 201
        assert admin.put("/v1/prompts/kept?visibility=public", content=artifact.content).status_code == 201
        assert a.post("/v1/completions", json={**GOOD, "model": "kept"}).status_code == 200
        assert (held(a, "kept"), held(b, "default/kept")) == (size, 0)
        assert b.post("/v1/completions", json={**GOOD, "model": "default/kept"}).status_code == 200
        assert held(b, "default/kept") == size
        hidden, absent = (b.get(f"/v1/prompts/a/{name}/residency") for name in ("kept", "absent"))
        assert hidden.status_code == 404 and hidden.text.replace("kept", "absent") == absent.text
        assert a.delete("/v1/prompts/kept").status_code == admin.delete("/v1/prompts/kept").status_code == 200
