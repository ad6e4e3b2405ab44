"""Training rows of chat messages over HTTP, and how a prompt that learned the plain form is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from promptd_store import PromptArtifact, PromptKind, encode

from promptd.jobs import JobClaims
from promptd.modeling.chat_template import PLAIN_TEMPLATE
from tests.api.conftest import MODEL, LiveServer
from tests.api.training_server import TrainingServer

ASK: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


def turn(role: str, content: Any = "hi") -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}


ROWS = [{"messages": [turn("user", f"say {number}"), turn("assistant", "word")]} for number in range(8)]


@pytest.fixture
def templated(trainer: TrainingServer) -> Iterator[None]:
    """The server's tokenizer has a template that takes no system message."""
    tokenizer = trainer.live.app.state.services.model.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    yield
    tokenizer.chat_template = None


def test_a_job_of_conversations(trainer: TrainingServer) -> None:
    """Rows arrive at the worker as they were sent; nothing about labels or templates is made up."""
    sdk, content = trainer.sdk(), b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    file = sdk.files.create(file=("chat.jsonl", content), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id)

    async def look(worker: JobClaims) -> bytes:
        claims = await worker.claim(100)  # other tests may have left some
        (claim,) = (one for one in claims if one.job.id == job.id)
        assert (claim.job.spec.template, claim.job.spec.label_words) == (None, None)
        data = await worker.data(claim)
        for one in claims:
            await worker.release(one)
        return data.training

    assert trainer.work(look) == content
    sdk.fine_tuning.jobs.cancel(job.id)
    sdk.files.delete(file.id)


def test_bad_conversations(trainer: TrainingServer, templated: None) -> None:
    """Line and message are named before the job exists, also for what only the model's template knows."""
    for bad, told in (
        ({"messages": [turn("user")]}, "line 9: the last message must be a non-empty one of the assistant"),
        ({"messages": [turn("user", 3), turn("assistant")]}, "line 9: message 1: 'content' must be a string, got 3"),
        ({"messages": [turn("system"), turn("assistant")]}, "line 9: the chat template refuses these messages: no sys"),
    ):
        with trainer.http("eve") as http:
            reply = http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "rows": [*ROWS, bad]})
            assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_training_data", "rows")
        assert told in error["message"]


def test_a_prompt_of_the_plain_form_can_chat(server: LiveServer, prompts: tuple[PromptArtifact, ...]) -> None:
    """Without a chat template, chat is for prompts that learned the plain form; the others are refused."""
    tensors = prompts[1].tensors["prompt_embeddings"]
    plain = encode(PromptKind.SOFT, tensors, template=PLAIN_TEMPLATE)
    with server.http() as http:
        assert http.put("/v1/prompts/plain-chat", content=plain.content).is_success
        body = ASK | {"model": "plain-chat", "messages": [turn("system", "be short"), turn("user")]}
        chat = http.post("/v1/chat/completions", json=body)
        text = "system:\nbe short\n\nuser:\nhi\n\nassistant:\n"
        same = http.post("/v1/completions", json=ASK | {"model": "p1", "prompt": text})
        field = http.post("/v1/completions", json=ASK | {"model": "plain-chat", "prompt": {"messages": text}})
        bare = http.post("/v1/completions", json=ASK | {"model": "plain-chat", "prompt": "hi"})
        refused = http.post("/v1/chat/completions", json={**body, "model": "p1"})
        rated = http.post("/v1/prompts/plain-chat/evaluate", json={"rows": ROWS})
        http.delete("/v1/prompts/plain-chat")
    answer = chat.json()["choices"][0]["message"]["content"]
    assert answer and answer == same.json()["choices"][0]["text"] == field.json()["choices"][0]["text"]
    assert (bare.status_code, bare.json()["error"]["code"]) == (400, "template_field_missing")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_chat_template")
    assert (rated.status_code, rated.json()["error"]["param"]) == (400, "rows")
    assert "line 1: is a conversation" in rated.json()["error"]["message"]
