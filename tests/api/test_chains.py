"""A prompt that was learned behind others, asked for by its own name over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from promptd_store import MAX_CHAIN_PROMPTS, PromptArtifact

from promptd.tenancy import Counts
from tests.api.conftest import LiveServer
from tests.patience import until

ASK = {"prompt": "book a table", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def http(server: LiveServer, prompts: tuple[PromptArtifact, ...]) -> Iterator[httpx.Client]:
    """A client of a server that has `team` behind p4, and `user` behind both."""
    with server.http() as client:
        for name, number, behind in (("team", 1, ["p4"]), ("user", 2, ["team"])):
            put = client.put(f"/v1/prompts/{name}", content=prompts[number].content, params={"behind": behind})
            assert put.is_success, put.text
        yield client
        for name in ("team", "user", "gone"):
            client.delete(f"/v1/prompts/{name}")


def tokens(http: httpx.Client, **naming: Any) -> tuple[list[int], list[str], int]:
    """Return what a request answers with: tokens, versions, and the number of virtual tokens."""
    reply = http.post("/v1/completions", json=ASK | naming)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    details = body["usage"]["prompt_tokens_details"]
    return body["choices"][0]["token_ids"], body["prompt_versions"], details["virtual_tokens"]


def test_a_name_serves_its_chain(http: httpx.Client, prompts: tuple[PromptArtifact, ...]) -> None:
    """One name, the whole chain in order: the answer, the versions and the usage of naming all of it."""
    chain = [prompts[number] for number in (4, 1, 2)]
    expected = [one.version for one in chain], sum(one.num_virtual_tokens for one in chain)
    whole = tokens(http, prompt_ids=["p4", "p1", "p2"])
    assert whole[1:] == expected
    for naming in (
        {"model": "user"},
        {"prompt_id": f"user@{prompts[2].version}"},
        {"prompt_ids": ["team", "user"]},
        {"prompt_ids": ["p4", "team", "user"]},
    ):
        assert tokens(http, **naming) == whole
    assert tokens(http, model="p2")[0] != whole[0]  # control: the same bytes alone say something else


def test_its_record_and_evaluation(http: httpx.Client, prompts: tuple[PromptArtifact, ...]) -> None:
    """The record names what is in front, the models' list says what room is left behind it; an evaluation is of the
    last one, behind the others."""
    room = http.get("/v1/models/tiny-llama").json()["max_model_len"]
    listed = {model["id"]: model["max_model_len"] for model in http.get("/v1/models").json()["data"]}
    for name, chain in (("user", (4, 1, 2)), ("team", (4, 1)), ("p4", (4,))):
        left = room - sum(prompts[number].num_virtual_tokens for number in chain)
        assert listed[name] == http.get(f"/v1/models/{name}").json()["max_model_len"] == left
    record = http.get("/v1/prompts/user").json()
    versions = [prompts[number].version for number in (4, 1)]
    assert [name.partition("@")[2] for name in record["behind"]] == versions
    rows = [{"text": f"is it {number}", "completion": " yes"} for number in range(3)]
    scored = http.post("/v1/prompts/user/evaluate", json={"rows": rows, "answer_by": "generate"})
    assert scored.status_code == 200, scored.text
    assert scored.json()["prompt"]["prompt_versions"] == [prompts[2].version]


def test_without_its_base_it_is_not_served(http: httpx.Client, prompts: tuple[PromptArtifact, ...]) -> None:
    """A deleted base is a typed error that names it, and too long a chain is one, too."""
    assert http.put("/v1/prompts/gone", content=prompts[3].content).is_success
    assert http.put("/v1/prompts/team", content=prompts[1].content, params={"behind": ["gone"]}).status_code == 200
    assert http.delete("/v1/prompts/gone").status_code == 200
    reply = http.post("/v1/completions", json=ASK | {"model": "team"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "prompt_chain_broken")
    assert "gone@sha256:" in reply.json()["error"]["message"]
    assert http.get("/v1/models/team").json()["max_model_len"] is None
    assert tokens(http, model="user")[1][0] == prompts[4].version  # pinned to what `team` was then
    bad = http.put("/v1/prompts/other", content=prompts[1].content, params={"behind": ["nobody"]})
    assert (bad.status_code, bad.json()["error"]["param"]) == (404, "behind")
    long = http.post("/v1/completions", json=ASK | {"prompt_ids": ["user"] * 6})
    assert (long.status_code, long.json()["error"]["param"]) == (400, "prompt_ids")
    assert "18 prompts" in long.json()["error"]["message"]
    most = [*["user"] * 5, "p4"]
    assert len(tokens(http, prompt_ids=most)[1]) == MAX_CHAIN_PROMPTS  # control: as many as may be
    more = http.post("/v1/completions", json=ASK | {"prompt_ids": [*most, "p4"]})
    assert (more.status_code, f"{MAX_CHAIN_PROMPTS} are allowed" in more.json()["error"]["message"]) == (400, True)


def test_every_prompt_of_a_chain_is_of_use(
    server: LiveServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger names each one, so that none in front of others is ever taken for unused; one counts the tokens."""
    usage, noted = server.app.state.services.gate.usage, {}
    add = usage.add

    def spy(tenant: str, key_id: str, prompt: str, counts: Counts) -> None:
        noted[prompt] = noted.get(prompt, Counts()) + counts
        add(tenant, key_id, prompt, counts)

    monkeypatch.setattr(usage, "add", spy)
    tokens(http, prompt_ids=["p4", "team", "user"])
    until(lambda: "user" in noted and noted["user"].requests)  # it is written down when the answer has gone out
    assert set(noted) == {"p4", "team", "user"}
    assert noted["p4"] == noted["team"] == Counts() != noted["user"]
