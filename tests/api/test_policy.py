"""The operator's say: whose prompts are taken, which probes they must pass, and those that were found to be bad."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from promptd_store import PromptArtifact, PromptRecord, encode
from pydantic import SecretStr

from promptd.api.uploads import TRAINED_HERE, seal_headers
from promptd.app import create_app
from promptd.engine.engine import Engine
from promptd.engine.runner import Answers, Made, Runner
from promptd.engine.scheduler import Schedule
from promptd.errors import InvalidRequestError, NumericalError
from promptd.settings import Settings
from promptd.vetting import Vetting, read_probes
from tests.api.conftest import MODEL, LiveServer, serve
from tests.engine.harness import library

ADMIN_KEY = "the-first-admin-key"
KEYS = {"acme": "acme-key-0001", "eve": "eve-key-00001"}
ASK = {"prompt": [5, 6, 7], "max_tokens": 3}


@contextmanager
def served(folder: Path, store: Path, **settings: Any) -> Iterator[LiveServer]:
    """A keyed server with settings of its own."""
    keys = SecretStr(",".join(f"{tenant}:{key}" for tenant, key in KEYS.items()))
    options = {"training": "off", "drain_seconds": 0, **settings}
    made = Settings(model=str(folder), store=str(store), admin_key=SecretStr(ADMIN_KEY), api_keys=keys, **options)
    with serve(made, folder) as live:
        yield live


def client(server: LiveServer, who: str = "acme") -> httpx.Client:
    """A client of a tenant, or of the admin."""
    return server.http(Authorization=f"Bearer {KEYS.get(who, ADMIN_KEY)}")


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error."""
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture(scope="module")
def server(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One that takes everybody's prompts."""
    with served(tiny_models["llama"], tmp_path_factory.mktemp("any")) as live:
        yield live


def test_as_it_is_set(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """From the settings to the routes: no learned prompt is taken, not even to be looked at; texts are."""
    suite = tmp_path / "probes.jsonl"
    suite.write_text(json.dumps(PROBES[0]))
    options = {"uploads": "none", "max_prefix_tokens": 4, "probe_suite": str(suite)}
    with served(tiny_models["llama"], tmp_path / "store", **options) as live, client(live) as http:
        content = library(live.folder)[0].content
        assert code_of(http.put("/v1/prompts/p", content=content)) == (403, "uploads_off")
        assert code_of(http.put("/v1/prompts/p", params={"dry_run": True}, content=content)) == (403, "uploads_off")
        assert http.get("/v1/prompts/p").status_code == 404
        assert http.put("/v1/prompts/t", json={"text": "be brief"}).status_code == 201
        assert live.app.state.services.limits.max_prefix_tokens == 4
        assert len(live.app.state.services.vetting.probes) == 1


def test_uploads_trained_here(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained here comes with a seal, and is taken with it: of that version, under any name and tenant."""
    services, (own, other) = server.app.state.services, library(server.folder)[:2]
    monkeypatch.setattr(services, "limits", replace(services.limits, uploads="trained-here"))
    record = _record(own, {"job": "job-1"})
    seal = seal_headers(services, record)
    assert set(seal) == {TRAINED_HERE} and seal_headers(services, replace(record, provenance={"seed": 1})) == {}
    with client(server, "eve") as http:
        assert code_of(http.put("/v1/prompts/p", content=own.content)) == (403, "not_trained_here")
        assert http.put("/v1/prompts/p", content=own.content, headers=seal).status_code == 201
        assert code_of(http.put("/v1/prompts/q", content=other.content, headers=seal)) == (403, "not_trained_here")
        assert TRAINED_HERE not in http.get("/v1/prompts/p/content").headers  # an upload is no training


def _record(artifact: PromptArtifact, provenance: dict[str, Any]) -> PromptRecord:
    return PromptRecord(
        tenant="acme", name="p", version=artifact.version, number=1, kind=artifact.kind, num_virtual_tokens=1,
        num_bytes=1, base_fingerprint=None, created_at=0, etag="", provenance=provenance, visibility="private",
        verified=False, manifest={}, content_digest="", adapter_config_digest=None, sidecar_digest=None,
    )  # fmt: skip


def test_longer_than_this_server_takes(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes where those tell, else by its virtual tokens (16-bit numbers take half)."""
    services = server.app.state.services
    monkeypatch.setattr(services, "limits", replace(services.limits, max_prefix_tokens=4))
    with client(server) as http:
        long = 0.1 * torch.randn(8, server.model.spec.hidden_size)
        half = encode("soft", long.bfloat16())
        assert code_of(http.put("/v1/prompts/p", content=half.content)) == (422, "num_virtual_tokens_out_of_range")
        assert http.put("/v1/prompts/p", content=encode("soft", long[:4]).content).status_code == 201


PROBES = [
    {"prompt": "the quick brown", "max_tokens": 8, "excludes": ["@@never@@"]},
    {"prompt": "is it", "labels": ["yes", "no"], "label": "yes"},
]


def test_a_probe_suite(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that fails a probe is not published, whoever asks; the message numbers the probes and quotes none."""
    services, content = server.app.state.services, library(server.folder)[1].content

    def probe(*rows: dict[str, Any]) -> None:
        suite = tmp_path / "probes.jsonl"
        suite.write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(services, "vetting", Vetting(services.engine, read_probes(str(suite))))

    with client(server) as http:
        probe(PROBES[0], {"prompt": "the quick brown", "max_tokens": 4, "contains": ["@@never@@"]})
        for params in ({}, {"dry_run": True}):
            refused = http.put("/v1/prompts/probed", params=params, content=content)
            assert code_of(refused) == (422, "probe_failed")
            assert "1 of this server's 2 probes" in refused.json()["error"]["message"]
            assert "never" not in refused.text
        assert http.get("/v1/prompts/probed").status_code == 404
        statuses = set()
        for label in ("yes", "no"):
            probe(PROBES[0], {**PROBES[1], "label": label})
            statuses.add(http.put("/v1/prompts/probed", content=content).status_code)
        assert statuses == {201, 422}  # one of the two is the more likely one


def test_what_has_passed_is_not_tried_again(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look beforehand and the upload behind it are one trial; another tenant's is another, as the time would tell.

    The control: what was refused is tried again, and so is what differs.
    """
    services, (one, other) = server.app.state.services, library(server.folder)[2:4]
    tried: list[tuple[str, str]] = []

    async def note(vetting: Vetting, artifact: PromptArtifact, tenant: str, token_ids: Sequence[int]) -> None:
        tried.append((tenant, artifact.version))
        if len(tried) == 1:
            raise NumericalError("not finite")

    monkeypatch.setattr(Vetting, "try_out", note)
    monkeypatch.setattr(services, "vetting", Vetting(services.engine))
    with client(server) as http, client(server, "eve") as eve:
        assert code_of(http.put("/v1/prompts/a", content=one.content)) == (422, "non_finite_output")
        for params in ({"dry_run": True}, {}):
            http.put("/v1/prompts/a", params=params, content=one.content).raise_for_status()
        http.put("/v1/prompts/b", content=other.content).raise_for_status()
        eve.put("/v1/prompts/a", content=one.content).raise_for_status()
    assert tried == [("acme", one.version)] * 2 + [("acme", other.version), ("eve", one.version)]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"prompt": "x"}', '{"prompt": "x", "expect": 1}', '{"prompt": "x", "labels": ["a"], "label": "b"}'],
)
def test_a_suite_that_says_nothing_is_refused_at_the_start(tmp_path: Path, line: str) -> None:
    """One clear line, with the number of the probe's."""
    suite = tmp_path / "probes.jsonl"
    suite.write_text(json.dumps(PROBES[0]) + "\n" + line)
    with pytest.raises(InvalidRequestError, match="line 2"):
        create_app(Settings(probe_suite=str(suite)))
    suite.write_text("")
    with pytest.raises(InvalidRequestError, match="0 probes"):
        read_probes(str(suite))


def test_a_prompt_that_breaks_is_found_at_once(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial at publication: numbers that are not finite refuse the prompt; without the trial it is published."""
    poison = encode("soft", torch.full((4, server.model.spec.hidden_size), 0.25))
    poisoned(monkeypatch, 4)
    with client(server) as http:
        assert code_of(http.put("/v1/prompts/bad", content=poison.content)) == (422, "non_finite_output")
        with monkeypatch.context() as off:
            off.setattr(Vetting, "try_out", untried)
            assert http.put("/v1/prompts/bad", content=poison.content).status_code == 201
        assert http.delete("/v1/prompts/bad").status_code == 200


async def untried(*_: Any) -> None:
    """No trial."""


def poisoned(monkeypatch: pytest.MonkeyPatch, num_virtual_tokens: int) -> None:
    """Make the logits of every row NaN that stands behind a prompt of so many virtual tokens."""
    run = Runner.run

    def running(runner: Runner, step: Schedule, made: Made | None = None) -> Answers:
        answers = run(runner, step, made)
        at = 0
        for row in step.rows:
            count = 1 if row.is_final else 0
            if any(entry.num_tokens == num_virtual_tokens for entry in row.seq.chain):
                answers.logits[at : at + count] = torch.nan
            at += count
        return answers

    monkeypatch.setattr(Runner, "run", running)


def test_quarantine(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that fails by itself is not served any more; a good one beside it is; an admin sees and lifts it."""
    hidden = server.model.spec.hidden_size
    bad, good = encode("soft", 0.1 * torch.randn(5, hidden)), encode("soft", 0.1 * torch.randn(3, hidden))
    with client(server) as http, client(server, "eve") as eve, client(server, "admin") as admin:
        for name, artifact in (("broken", bad), ("good", good)):
            assert http.put(f"/v1/prompts/{name}", content=artifact.content).status_code == 201
            assert eve.put(f"/v1/prompts/{name}", content=artifact.content).status_code == 201
        with monkeypatch.context() as broken:
            poisoned(broken, 5)
            failed = http.post("/v1/completions", json={**ASK, "prompt_ids": ["good", "broken"]})
            assert code_of(failed) == (500, "numerical_error")
            tries = 0
            while code_of(answer := http.post("/v1/completions", json={**ASK, "model": "broken"}))[0] == 500:
                tries += 1
                assert tries < 1000
            assert code_of(answer) == (409, "prompt_quarantined")
            assert answer.json()["error"]["param"] == "model"
        for route, body in (
            ("/v1/completions", {**ASK, "prompt_ids": ["good", "broken"]}),
            ("/v1/completions", {**ASK, "model": "broken", "stream": True}),
            ("/v1/classify", {"model": "broken", "input": "x", "labels": ["a", "b"]}),
        ):
            assert code_of(http.post(route, json=body)) == (409, "prompt_quarantined")
        assert http.post("/v1/completions", json={**ASK, "model": "good"}).status_code == 200
        assert eve.post("/v1/completions", json={**ASK, "model": "broken"}).status_code == 200  # her own, never failed
        (listed,) = admin.get("/admin/quarantine").json()["data"]
        assert (listed["tenant"], listed["prompt"], listed["version"]) == ("acme", "broken", bad.version)
        assert [one["action"] for one in audit(admin)] == ["prompt.quarantined"]
        path = f"/admin/quarantine/acme/{bad.version}"
        assert code_of(http.delete(path))[0] == 403
        assert admin.delete(path).json()["released"] is True
        assert code_of(admin.delete(path)) == (404, "not_found")
        assert http.post("/v1/completions", json={**ASK, "model": "broken"}).status_code == 200
        assert [one["action"] for one in audit(admin)] == ["prompt.quarantined", "prompt.released"]
        assert admin.get("/admin/quarantine").json()["data"] == []


def audit(admin: httpx.Client) -> list[dict[str, Any]]:
    """What the audit log of acme says of its prompts."""
    entries = admin.get("/admin/audit", params={"tenant": "acme"}).json()["data"]
    return [one for one in entries if one["action"].startswith("prompt.")]


def test_nobody_has_anothers_prompt_quarantined(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public prompt in a chain that fails stays in service: only its owner's own requests could put it there."""
    hidden = server.model.spec.hidden_size
    with client(server, "admin") as admin, client(server, "eve") as eve:
        public = encode("soft", 0.1 * torch.randn(7, hidden))
        told = admin.put("/v1/prompts/shared", params={"visibility": "public"}, content=public.content)
        assert told.status_code == 201
        poisoned(monkeypatch, 7)
        for _ in range(3):
            assert code_of(eve.post("/v1/completions", json={**ASK, "model": "shared"})) == (500, "numerical_error")
        assert not server.app.state.services.quarantine._suspects
        assert admin.get("/admin/quarantine").json()["data"] == []
        assert admin.delete("/v1/prompts/shared").status_code == 200


def test_the_engine_goes_on(server: LiveServer) -> None:
    """After all this it is the same engine, and whole."""
    engine: Engine = server.app.state.services.engine.engine
    with client(server) as http:
        assert http.post("/v1/completions", json={**ASK, "model": MODEL}).status_code == 200
    engine.check_integrity()
