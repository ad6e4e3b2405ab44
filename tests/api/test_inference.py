"""Answers over HTTP: plain, streamed, chained, classified."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import threading
from typing import Any

import openai
import pytest
import torch
from promptd_store import PromptArtifact, encode

from tests.api.conftest import MODEL, LiveServer
from tests.engine.harness import Case, assert_matches_oracle, greedy
from tests.patience import PATIENCE_SECONDS, until

TEXT = list(range(5, 25))


def ask(server: LiveServer, **body: Any) -> dict[str, Any]:
    """POST /v1/completions and return the answer."""
    defaults = {"model": MODEL, "prompt": TEXT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with server.http() as http:
        answer = http.post("/v1/completions", json={**defaults, "return_token_ids": True, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def is_idle(server: LiveServer) -> bool:
    """Whether nothing runs or waits; `stats()` is of the last step and may not know yet of what has just come."""
    engine = server.app.state.services.engine
    return not (engine._inbox or engine._streams or engine.engine.has_work)


def test_six_prompts_at_once_are_each_exact(server: LiveServer, prompts: tuple[PromptArtifact, ...]) -> None:
    """Concurrent requests under six prompts and none: each answer equals transformers' own and names its version."""
    jobs = [*range(6), None] * 2
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda n: ask(server, **({} if n is None else {"model": f"p{n}"})), jobs))
    for number, answer in zip(jobs, answers, strict=True):
        chain = () if number is None else (prompts[number],)
        assert answer["prompt_versions"] == [prompt.version for prompt in chain]
        case = Case(chain, tuple(TEXT), greedy(6))
        token_ids = tuple(answer["choices"][0]["token_ids"])
        case.outputs = [_Made(token_ids)]  # type: ignore[list-item]
        assert_matches_oracle(server.folder, case)
        virtual = sum(prompt.num_virtual_tokens for prompt in chain)
        assert answer["usage"]["prompt_tokens_details"]["virtual_tokens"] == virtual
        assert answer["usage"]["prompt_tokens"] == len(TEXT)
        assert answer["usage"]["completion_tokens"] == 6


class _Made:
    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids


def test_every_way_to_name_a_prompt(server: LiveServer) -> None:
    """`model`, `base:prompt`, `prompt_id`, a version and a digest name the same prompt; chains keep their order."""
    expected = ask(server, model="p2")
    version = expected["prompt_versions"][0]
    for names in (
        {"model": f"{MODEL}:p2"},
        {"prompt_id": "p2"},
        {"prompt_ids": ["p2"]},
        {"model": "p2@1"},
        {"model": f"p2@{version}"},
    ):
        answer = ask(server, **names)
        assert answer["choices"] == expected["choices"]
        assert answer["prompt_versions"] == [version]
    one, other = ask(server, prompt_ids=["p2", "p3"]), ask(server, prompt_ids=["p3", "p2"])
    assert one["prompt_versions"] == other["prompt_versions"][::-1]


def test_the_openai_sdk_works(server: LiveServer) -> None:
    """The official SDK: models, completions, streaming, n, logprobs, typed errors."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert {MODEL, "p0", "p5"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("p0").id == "p0"
    plain = client.completions.create(model="p1", prompt="the quick", max_tokens=8, temperature=0)
    stream = client.completions.create(
        model="p1", prompt="the quick", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == plain.choices[0].text
    assert chunks[-1].usage == plain.usage or chunks[-1].usage.total_tokens == plain.usage.total_tokens  # type: ignore[union-attr]
    several = client.completions.create(model="p1", prompt=["the", "fox"], max_tokens=3, n=2, logprobs=2, seed=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(several.choices[0].logprobs.token_logprobs) == 3  # type: ignore[union-attr, arg-type]
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="absent", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="p1", prompt="x", max_tokens=1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(model="p1", messages=[{"role": "user", "content": "hi"}])
    assert chat.value.code == "no_chat_template"


def test_chat_uses_the_tokenizers_template(server: LiveServer) -> None:
    """With a chat template, chat equals a completion of the rendered text, plain and streamed."""
    tokenizer = server.app.state.services.model.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        messages: Any = [{"role": "user", "content": "the fox"}]
        chat = client.chat.completions.create(
            model="p1", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
        )
        plain = ask(server, model="p1", prompt="user: the fox\nassistant:", ignore_eos=False)
        assert chat.choices[0].message.content == plain["choices"][0]["text"]
        assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2  # type: ignore[union-attr, index]
        stream = client.chat.completions.create(model="p1", messages=messages, max_tokens=6, temperature=0, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == chat.choices[0].message.content
    finally:
        tokenizer.chat_template = None


def test_echo_and_logprobs_line_up(server: LiveServer) -> None:
    """`echo` with `logprobs` returns the text's own log-probabilities; the first has none; offsets fit the text."""
    answer = ask(server, prompt="the quick brown fox", echo=True, logprobs=1, max_tokens=2)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("the quick brown fox")
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_classification_scores_the_label_words(server: LiveServer) -> None:
    """Probabilities are the softmax of the label words' log-probabilities; the template of the prompt is applied;
    an ensemble is the mean over its members."""
    embeds = server.model.embed(torch.tensor([7, 9, 11]))
    words = {"fox": " fox", "dog": " lazy dog"}
    prompts = {
        "classify-a": encode("soft", embeds, template="{text} is a", label_words=words),
        "classify-b": encode("soft", -embeds, template="{text} is a", label_words=words),
    }
    probs = []
    with server.http() as http:
        for name, artifact in prompts.items():
            assert http.put(f"/v1/prompts/{name}", content=artifact.content).status_code == 201
            answer = http.post("/v1/classify", json={"model": name, "input": ["it"]}).json()
            (row,) = answer["data"]
            assert row["labels"] == ["fox", "dog"] and row["num_classes"] == 2
            assert sum(row["probs"]) == pytest.approx(1)
            assert row["label"] == row["labels"][row["probs"].index(max(row["probs"]))]
            expected = []
            for word in words.values():
                echo = ask(server, model=name, prompt="it is a" + word, apply_template=False, echo=True, logprobs=0)
                count = len(server.model.encode(word, add_special_tokens=False))
                start = len(server.model.encode("it is a"))
                expected.append(sum(echo["choices"][0]["logprobs"]["token_logprobs"][start : start + count]))
            weights = [math.exp(value) for value in expected]
            assert row["probs"][0] == pytest.approx(weights[0] / sum(weights), abs=1e-4)
            probs.append(row["probs"])
        both = http.post("/v1/classify", json={"ensemble": list(prompts), "input": "it"}).json()
        mean = [(a + b) / 2 for a, b in zip(*probs, strict=True)]
        assert both["data"][0]["probs"] == pytest.approx(mean)
        bare = http.post("/v1/classify", json={"model": MODEL, "input": "it"})
        assert bare.json()["error"]["param"] == "labels"


def test_an_ensemble_of_texts_takes_the_majority(server: LiveServer) -> None:
    """Ties go to the first; every vote is shown."""
    answer = ask(server, ensemble=["p1", "p2", "p1"])
    assert answer["choices"][0]["text"] == ask(server, model="p1")["choices"][0]["text"]
    assert sum(answer["choices"][0]["votes"].values()) == 3


def test_a_cold_prompt_holds_nobody_up(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are on their way for as long as that takes: others are meanwhile decoded from first to last token."""
    store, hidden = server.app.state.services.catalog.store, server.model.spec.hidden_size
    asked, is_there, get_blob = threading.Event(), threading.Event(), store.get_blob

    async def slow(tenant: str, digest: str) -> bytes:
        asked.set()
        await asyncio.to_thread(is_there.wait, PATIENCE_SECONDS)
        content: bytes = await get_blob(tenant, digest)
        return content

    with server.http() as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
        put = http.put("/v1/prompts/cold", content=encode("soft", 0.1 * torch.ones(3, hidden)).content)
        monkeypatch.setattr(store, "get_blob", slow)
        waiting = pool.submit(ask, server, model="cold")
        try:
            assert asked.wait(PATIENCE_SECONDS)
            assert ask(server, max_tokens=100)["usage"]["completion_tokens"] == 100
            assert not waiting.done()
        finally:
            is_there.set()
        assert waiting.result()["prompt_versions"] == [put.json()["version"]]
        http.delete("/v1/prompts/cold")


def test_a_lost_client_frees_its_row(server: LiveServer) -> None:
    """Closing the connection in the middle of a stream, or of a unary call, ends the row in the engine."""
    engine = server.app.state.services.engine
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 220, "ignore_eos": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    until(lambda: engine.stats().num_requests_running == 0)
    aborted = engine.stats().requests_aborted
    with server.http() as http, pytest.raises(Exception, match="timed out"):
        http.post("/v1/completions", json={**body, "n": 16, "prompt": TEXT[:3]}, timeout=0.02)
    until(lambda: engine.stats().requests_aborted > aborted)
    until(lambda: is_idle(server))
    until(lambda: engine.stats().kv_cache_usage_ratio == 0)


def test_a_full_queue_answers_503(server: LiveServer) -> None:
    """More than the queue holds: 503 with Retry-After, at once, all or none."""
    body = {"model": MODEL, "prompt": ["x"] * 12, "n": 2, "max_tokens": 200, "ignore_eos": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json={**body, "stream": True}) as first:
        assert first.status_code == 200
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full"
    until(lambda: is_idle(server))


def test_streams_end_properly(server: LiveServer) -> None:
    """SSE headers, one JSON object an event, `[DONE]` at the end."""
    with server.http() as http:
        body = {"model": "p1", "prompt": "the", "max_tokens": 3, "stream": True, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    assert answer.headers["cache-control"] == "no-cache"
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]][-1] == "length"


def test_a_stream_names_the_tokens_of_its_input(server: LiveServer) -> None:
    """With `return_token_ids` the first event of each choice has the input's tokens, as the whole answer has."""
    body = {"model": "p1", "prompt": TEXT, "n": 2, "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
    with server.http() as http:
        lines = http.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    for index in range(2):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [piece.get("prompt_token_ids") for piece in pieces] == [TEXT, *[None] * (len(pieces) - 1)]
        assert sum(len(piece["token_ids"]) for piece in pieces) == 3 and len(pieces) > 1
