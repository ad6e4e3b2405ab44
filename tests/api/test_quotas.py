"""Quotas over HTTP, as OpenAI's SDK and the client meet them: counted, refused, shown and given back."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest
from promptd_client import Client, QuotaError
from typer.testing import CliRunner

from promptd.cli import app
from tests.api.conftest import ADMIN_KEY, MODEL, LiveServer
from tests.engine.harness import library

ROWS = b"".join(json.dumps({"prompt": f"row {n}", "completion": " yes"}).encode() + b"\n" for n in range(20))
STEPS = {"type": "residual", "residual": {"hyperparameters": {"num_steps": 100}}}


def refusal(answer: httpx.Response) -> tuple[int, str, str, str, str]:
    """What a refused call is told."""
    error = answer.json()["error"]
    return answer.status_code, error["type"], error["code"], error["param"], answer.headers["x-should-retry"]


def test_prompts_and_bytes(tenanted: LiveServer, admin: Client) -> None:
    """One too many is 429 insufficient_quota, which clients do not repeat; deleting makes room; the admin sees it."""
    key = admin.keys.create("full").key
    one, two = (artifact.content for artifact in library(tenanted.folder)[:2])
    admin.tenants.set("full", max_prompts=1)
    with tenanted.http(Authorization=f"Bearer {key}") as http:
        assert http.put("/v1/prompts/a", content=one).status_code == 201
        refused = http.put("/v1/prompts/b", content=one)
        assert refusal(refused) == (429, "insufficient_quota", "insufficient_quota", "prompts", "false")
        assert "1 prompts are held and 1 more wanted; 1 are allowed" in refused.json()["error"]["message"]
        assert http.put("/v1/prompts/a", content=two).status_code == 200
        held = admin.tenants.get("full").held
        assert held is not None and held["prompts"] == 1
        assert held["stored_bytes"] > len(one) + len(two)
        admin.tenants.set("full", max_prompts=None, max_stored_bytes=held["stored_bytes"])
        assert refusal(http.put("/v1/prompts/b", content=one))[3] == "stored_bytes"
        sent: list[int] = []
        with httpx.Client(event_hooks={"response": [lambda answer: sent.append(answer.status_code)]}) as plain:
            sdk = openai.OpenAI(base_url=f"{tenanted.url}/v1", api_key=key, max_retries=3, http_client=plain)
            with pytest.raises(openai.RateLimitError) as never:
                sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        assert (never.value.code, never.value.type, sent) == ("insufficient_quota", "insufficient_quota", [429])
        with Client(tenanted.url, api_key=key, max_retries=3) as own, pytest.raises(QuotaError):
            own.prompts.upload("b", one)
        assert http.delete("/v1/prompts/a").status_code == 200
        assert http.put("/v1/prompts/b", content=one).status_code == 201
        assert http.post("/v1/completions", json={"model": "b", "prompt": [5], "max_tokens": 1}).status_code == 200


def test_jobs_and_their_steps(tenanted: LiveServer, admin: Client) -> None:
    """Jobs fill their quota until they end (429, later); the steps of a day are used up (429, not again)."""
    key = admin.keys.create("eager").key
    admin.tenants.set("eager", max_training_jobs=1, training_steps_per_day=250)
    with openai.OpenAI(base_url=f"{tenanted.url}/v1", api_key=key, max_retries=0) as sdk:
        rows = sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")

        def create() -> str:
            job = sdk.fine_tuning.jobs.create(model=MODEL, training_file=rows.id, extra_body={"method": STEPS})
            return job.id

        first = create()
        with pytest.raises(openai.RateLimitError) as full:
            create()
        assert (full.value.code, full.value.type) == ("too_many_training_jobs", "rate_limit_error")
        assert full.value.response.headers["retry-after"] == "30"
        sdk.fine_tuning.jobs.cancel(first)
        admin.tenants.set("eager", max_training_jobs=2)
        create(), create()
        admin.tenants.set("eager", max_training_jobs=None)
        with pytest.raises(openai.RateLimitError) as spent:
            create()
        assert (spent.value.code, spent.value.type) == ("insufficient_quota", "insufficient_quota")
    with tenanted.http(Authorization=f"Bearer {key}") as http:
        inline = {"rows": [json.loads(row) for row in ROWS.splitlines()], "method": STEPS}
        assert refusal(http.post("/v1/fine_tuning/jobs", json=inline))[3] == "training_steps"
    held = admin.tenants.get("eager").held
    assert held is not None
    assert (held["training_jobs"], held["training_steps"]) == (2, 200)
    assert held["stored_bytes"] == len(ROWS)  # rows that came with a refused job count for nothing


def test_quotas_from_a_file(tenanted: LiveServer, admin: Client, tmp_path: Path) -> None:
    """`promptd apply` sets them and takes them away, `--diff` tells; a lower one than is held only stops more."""
    file = tmp_path / "tenants.yaml"
    words = ["apply", str(file), "--url", tenanted.url, "--api-key", ADMIN_KEY]

    def apply(text: str, *options: str) -> list[str]:
        file.write_text(f"tenants: {{team: {text}}}")
        return CliRunner().invoke(app, [*words, *options]).stdout.splitlines()

    key = admin.keys.create("team").key
    with tenanted.http(Authorization=f"Bearer {key}") as http:
        content = library(tenanted.folder)[0].content
        for name in ("a", "b"):
            assert http.put(f"/v1/prompts/{name}", content=content).status_code == 201
        told = ["team  max_prompts: none -> 1", "team  training_steps_per_day: none -> 5000"]
        wanted = "{max_prompts: 1, training_steps_per_day: 5000}"
        assert apply(wanted, "--diff") == told == apply(wanted)
        assert http.put("/v1/prompts/c", content=content).status_code == 429
        assert http.delete("/v1/prompts/b").status_code == 200
        assert http.put("/v1/prompts/c", content=content).status_code == 429
        assert apply("{}") == ["team  max_prompts: 1 -> none", "team  training_steps_per_day: 5000 -> none"]
        assert http.put("/v1/prompts/c", content=content).status_code == 201


def test_resident_bytes(tenanted: LiveServer, admin: Client) -> None:
    """A prompt that alone takes more than may be resident is refused for good; the bare model is not."""
    key = admin.keys.create("tight").key
    with tenanted.http(Authorization=f"Bearer {key}") as http:
        assert http.put("/v1/prompts/a", content=library(tenanted.folder)[3].content).status_code == 201
        ask = {"prompt": [5, 6], "max_tokens": 1}
        admin.tenants.set("tight", max_resident_bytes=1)
        assert refusal(http.post("/v1/completions", json={**ask, "model": "a"}))[3] == "resident_bytes"
        assert http.post("/v1/completions", json={**ask, "model": MODEL}).status_code == 200
        admin.tenants.set("tight", max_resident_bytes=None)
        assert http.post("/v1/completions", json={**ask, "model": "a"}).status_code == 200
