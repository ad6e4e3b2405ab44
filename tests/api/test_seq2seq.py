"""A server of T5: completions, streams and classes over HTTP, under different prompts at once."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.harness import assert_greedy, frozen
from tests.engine.seq2seq_oracle import Row, library

TEXT = "the quick brown fox jumps"
START = (0,)


@pytest.fixture(scope="module")
def server(tiny_seq2seq: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A tiny T5 with the prompts s0, s1, …"""
    folder = tiny_seq2seq["t5"]
    settings = Settings(model=str(folder), store=str(tmp_path_factory.mktemp("store")), training="off", drain_seconds=1)
    with serve(settings, folder) as live:
        with live.http() as http:
            for number, artifact in enumerate(library(folder)):
                assert http.put(f"/v1/prompts/s{number}", content=artifact.content).status_code == 201
        yield live


def post(server: LiveServer, path: str, expected: int = 200, **body: Any) -> dict[str, Any]:
    """POST and return the answer."""
    with server.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == expected, answer.text
    return answer.json()  # type: ignore[no-any-return]


def assert_oracles(folder: Path, number: int | None, token_ids: list[int]) -> None:
    """The tokens are transformers' own."""
    prompts = () if number is None else (library(folder)[number],)
    row = Row(folder, prompts, frozen(folder).encode(TEXT))
    assert_greedy(token_ids, row.logits_of(START, token_ids), number)


def test_every_prompt_at_once_is_exact(server: LiveServer) -> None:
    """Concurrent completions under ten prompts and none, of different lengths: transformers' own tokens."""
    jobs: list[int | None] = [*range(10), None] * 2

    def ask(job: tuple[int, int | None]) -> dict[str, Any]:
        order, number = job
        body: dict[str, Any] = {} if number is None else {"model": f"s{number}"}
        body |= {"prompt": TEXT, "max_tokens": 3 + order % 5, "temperature": 0, "ignore_eos": True}
        return post(server, "/v1/completions", return_token_ids=True, **body)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, enumerate(jobs)))
    for order, (number, answer) in enumerate(zip(jobs, answers, strict=True)):
        token_ids = answer["choices"][0]["token_ids"]
        assert len(token_ids) == 3 + order % 5
        assert_oracles(server.folder, number, token_ids)
        assert answer["usage"]["prompt_tokens"] == len(server.model.encode(TEXT))
        prompt = None if number is None else library(server.folder)[number]
        count = 0 if prompt is None else prompt.num_virtual_tokens + 5 * (prompt.target_embeddings is not None)
        assert answer["usage"]["prompt_tokens_details"]["virtual_tokens"] == count


def test_streams_say_what_completions_say(server: LiveServer) -> None:
    """OpenAI's SDK, plain and streamed, n and log-probabilities."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    asked: dict[str, Any] = {"model": "s2", "prompt": TEXT, "max_tokens": 7, "temperature": 0}
    plain = client.completions.create(**asked, logprobs=2)
    chunks = list(client.completions.create(**asked, stream=True))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    several = client.completions.create(model="s2", prompt=[TEXT, "a"], max_tokens=3, n=2, seed=5)
    assert len(several.choices) == 4


def test_classes_by_label_words(server: LiveServer) -> None:
    """A softmax over the words' log-probabilities as targets, of several tokens too."""
    words = {"yes": " fox", "no": " lazy dog"}
    answer = post(server, "/v1/classify", model="s1", input=[TEXT], labels=words)["data"][0]
    row = Row(server.folder, (library(server.folder)[1],), server.model.encode(TEXT))
    scores = []
    for word in words.values():
        ids = server.model.encode(word, add_special_tokens=False)
        logprobs = row.logits((*START, *ids[:-1])).log_softmax(-1)
        scores.append(logprobs[range(len(ids)), ids].sum())
    torch.testing.assert_close(torch.tensor(answer["probs"]), torch.stack(scores).softmax(0), rtol=0, atol=1e-3)


def test_what_it_refuses(server: LiveServer) -> None:
    """Echoed log-probabilities, embeddings and classes without words: typed errors that name the field."""
    echo = post(server, "/v1/completions", 400, prompt=TEXT, echo=True, logprobs=1, max_tokens=1)
    assert echo["error"]["param"] == "echo"
    assert post(server, "/v1/embeddings", 400, input=TEXT)["error"]["param"] == "model"
    assert post(server, "/v1/classify", 400, input=TEXT)["error"]["param"] == "labels"
