"""A server of encoders: classes, words at a mask and embeddings over HTTP, under different prompts at once."""

from __future__ import annotations

import concurrent.futures
import struct
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from promptd_client import Client
from promptd_store import encode

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.encoder_oracle import class_scores, hidden_states, library, oracle
from tests.engine.harness import library as decoder_library
from tests.patience import until
from tests.training.test_job import SNIPS

TEXT = "the quick brown fox"
LABELS = ("weather", "music", "travel", "other")


def server_of(folder: Path, store: Path, **settings: Any) -> Iterator[LiveServer]:
    """A server without training, with the model's prompts e0, e1, …"""
    every = {"model": str(folder), "store": str(store), "training": "off", "drain_seconds": 1, **settings}
    with serve(Settings(**every), folder) as live:
        with live.http() as http:
            for number, artifact in enumerate(library(folder, "bert")):
                answer = http.put(f"/v1/prompts/e{number}", content=artifact.content)
                assert answer.status_code in (201, 422)
                assert (answer.status_code == 201) or "bert" not in folder.name
        yield live


@pytest.fixture(scope="module")
def classifier(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A tiny BERT with a classification head."""
    yield from server_of(tiny_encoders["bert"], tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def words(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A tiny BERT with a masked-LM head."""
    yield from server_of(tiny_encoders["bert-words"], tmp_path_factory.mktemp("store"))


def post(server: LiveServer, path: str, expected: int = 200, **body: Any) -> dict[str, Any]:
    """POST and return the answer."""
    with server.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == expected, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_eight_prompts_at_once_are_each_exact(classifier: LiveServer) -> None:
    """Concurrent classifications under every prompt and none: probabilities equal transformers' own."""
    prompts = library(classifier.folder, "bert")
    ids = classifier.model.encode(TEXT)
    jobs: list[int | None] = [*range(len(prompts)), None] * 2
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        names = [{} if n is None else {"model": f"e{n}"} for n in jobs]
        answers = list(pool.map(lambda name: post(classifier, "/v1/classify", input=[TEXT], **name), names))
    for number, answer in zip(jobs, answers, strict=True):
        chain = () if number is None else (prompts[number],)
        expected = class_scores(classifier.folder, chain, ids).softmax(-1)
        (result,) = answer["data"]
        torch.testing.assert_close(torch.tensor(result["probs"]), expected, rtol=0, atol=1e-3)
        assert result["labels"] == [f"LABEL_{index}" for index in range(len(expected))]
        assert result["num_classes"] == len(expected)
        assert result["label"] == result["labels"][int(expected.argmax())]
        assert answer["prompt_versions"] == [prompt.version for prompt in chain]
        assert answer["usage"]["prompt_tokens"] == len(ids)


def test_names_of_classes(classifier: LiveServer) -> None:
    """The prompt names its classes, a request may rename them; a number of names that does not fit is an error."""
    prompt = library(classifier.folder, "bert")[6]  # four classes
    named = encode("prefix", dict(prompt.tensors), labels=LABELS)
    with classifier.http() as http:
        assert http.put("/v1/prompts/named", content=named.content).status_code == 201
        assert http.get("/v1/prompts/named").json()["manifest"]["labels"] == list(LABELS)
    assert post(classifier, "/v1/classify", input=TEXT, model="named")["data"][0]["labels"] == list(LABELS)
    renamed = post(classifier, "/v1/classify", input=TEXT, model="named", labels=["a", "b", "c", "d"])["data"][0]
    assert renamed["labels"] == ["a", "b", "c", "d"]
    error = post(classifier, "/v1/classify", 400, input=TEXT, model="named", labels=["a", "b"])["error"]
    assert error["param"] == "labels" and "2 classes" in error["message"]
    both = post(classifier, "/v1/classify", input=[TEXT, "x"], ensemble=["named", "named"])
    assert both["data"][0]["labels"] == list(LABELS)


def test_label_words_at_the_mask(words: LiveServer) -> None:
    """The template brings the mask, the prompt its label words: a softmax over the words' scores there."""
    soft = encode(
        "soft",
        library(words.folder, "bert")[1].tensors["prompt_embeddings"],
        prompt_after_bos=True,
        template="{text} is<mask>",
        label_words={"good": "a", "bad": "b"},
    )
    with words.http() as http:
        assert http.put("/v1/prompts/mood", content=soft.content).status_code == 201
    answer = post(words, "/v1/classify", input=TEXT, model="mood")["data"][0]
    ids = words.model.encode(f"{TEXT} is<mask>")
    (first,), (second,) = (words.model.encode(word, add_special_tokens=False) for word in "ab")
    logits = hidden_states(oracle(words.folder), words.folder, [soft], ids).logits[0, -2]
    expected = logits[[first, second]].softmax(-1)
    torch.testing.assert_close(torch.tensor(answer["probs"]), expected, rtol=0, atol=1e-3)
    assert answer["labels"] == ["good", "bad"]
    bare = post(words, "/v1/classify", 400, input=TEXT)["error"]
    assert bare["param"] == "labels"
    no_mask = post(words, "/v1/classify", 400, input=TEXT, labels=["a", "b"])["error"]
    assert no_mask["param"] == "input" and "<mask>" in no_mask["message"]


def test_embeddings_by_openais_client_and_ours(classifier: LiveServer) -> None:
    """OpenAI's SDK (which asks for base64), our client and plain numbers agree, and with transformers."""
    ids = classifier.model.encode(TEXT)
    prompt = library(classifier.folder, "bert")[4]
    hidden = hidden_states(oracle(classifier.folder), classifier.folder, [prompt], ids).hidden_states[-1][0]
    sdk = openai.OpenAI(base_url=f"{classifier.url}/v1", api_key="unused", max_retries=0)
    (by_sdk,) = sdk.embeddings.create(model="e4", input=TEXT).data
    torch.testing.assert_close(torch.tensor(by_sdk.embedding), hidden.mean(0), rtol=0, atol=1e-4)
    by_ids = sdk.embeddings.create(model="e4", input=[ids, ids[:3]], encoding_format="float")
    assert by_ids.data[0].embedding == pytest.approx(by_sdk.embedding, abs=1e-5)
    assert by_ids.usage.prompt_tokens == len(ids) + 3
    with Client(classifier.url) as client:
        ours = client.embed([TEXT, "another"], model="e4")
    assert ours.vectors[0] == pytest.approx(by_sdk.embedding, abs=1e-5)
    raw = post(classifier, "/v1/embeddings", input=TEXT, encoding_format="base64")["data"][0]["embedding"]
    assert len(struct.unpack("<48f", b64decode(raw))) == 48


def test_what_an_encoder_refuses(classifier: LiveServer, tiny_models: dict[str, Path]) -> None:
    """Completions, prompts of another model, a head on a server of decoders: typed errors that name the field."""
    error = post(classifier, "/v1/completions", 400, model="e0", prompt=TEXT)["error"]
    assert error["param"] == "model" and "does not continue" in error["message"]
    foreign = decoder_library(tiny_models["llama"])
    with classifier.http() as http:
        assert http.put("/v1/prompts/x", content=foreign[0].content).json()["error"]["code"] == "base_mismatch"
        wrong = http.put("/v1/prompts/x", content=foreign[4].content)
        assert wrong.status_code == 422 and wrong.json()["error"]["code"] == "shape_mismatch"
        assert http.get("/v1/prompts/x").status_code == 404


def fill_a_batch_of_five(live: LiveServer) -> None:
    """Four requests wait, and run with a fifth."""
    engine = live.app.state.services.engine.engine
    before = engine.counters.steps
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        early = [pool.submit(post, live, "/v1/classify", input=f"{TEXT} {n}") for n in range(4)]
        until(lambda: len(engine.scheduler.waiting) == 4)
        assert engine.counters.steps == before
        post(live, "/v1/classify", input=TEXT)
    assert all(len(one.result()["data"]) == 1 for one in early)


def wait_alone(live: LiveServer) -> None:
    """One request runs when its time is up."""
    began = time.monotonic()
    post(live, "/v1/classify", input=TEXT)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize(("wait", "ask"), [(0.3, wait_alone), (59.0, fill_a_batch_of_five)])
def test_requests_wait_a_bounded_time_for_others(
    tiny_encoders: dict[str, Path], tmp_path: Path, wait: float, ask: Callable[[LiveServer], None]
) -> None:
    """As long as they are told to, or until the batch is full: one step either way."""
    options: dict[str, Any] = {"model": str(tiny_encoders["bert"]), "store": str(tmp_path), "drain_seconds": 0}
    settings = Settings(**options, training="off", max_num_seqs=5, batch_wait_seconds=wait)
    with serve(settings, tiny_encoders["bert"]) as live:
        ask(live)
        assert live.app.state.services.engine.engine.counters.steps == 1


def test_a_prompt_and_its_head_are_trained_by_a_job_and_serve(tiny_encoders: dict[str, Path], tmp_path: Path) -> None:
    """Rows in, a published prompt with a head out, on the resident encoder: it names the rows' labels, rightly but for
    those that were held out (a random model tells nobody anything about them)."""
    rows = [{"text": text, "label": label} for text, label in SNIPS] * 3
    hyperparameters = {"num_virtual_tokens": 4, "num_steps": 60, "batch_size": 5, "learning_rate": 0.3}
    method = {"type": "prompt_tuning", "prompt_tuning": {"hyperparameters": hyperparameters}}
    settings = Settings(model=str(tiny_encoders["bert"]), store=str(tmp_path), drain_seconds=1)
    with serve(settings, tiny_encoders["bert"]) as live:
        with live.http() as http:
            job = {"name": "intents", "rows": rows, "method": method, "publish_worse": True}
            answer = http.post("/admin/training/jobs", json={"jobs": [job]})
            assert answer.status_code == 207, answer.text
            (job_id,) = [result["job"]["id"] for result in answer.json()["data"]]
            state = live.ended(job_id)
            assert state["status"] == "succeeded", state["error"]
        answers = post(live, "/v1/classify", model="intents", input=[text for text, _ in SNIPS])["data"]
        assert answers[0]["labels"] == ["GetWeather", "PlayMusic"]
        assert sum(one["label"] == label for one, (_, label) in zip(answers, SNIPS, strict=True)) >= 8
