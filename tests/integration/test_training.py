"""From a file of real rows to a better prompt, as a user of OpenAI's SDK goes: upload, train, watch, ask."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_NAME
from tests.integration.server import demo_server

NUM_TRAIN = 200


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`promptd serve` as a user starts it: it trains by default."""
    yield from demo_server(tmp_path_factory.mktemp("training"))


def test_upload_train_ask(url: str) -> None:
    """A job on 200 questions of banking customers beats the bare model on 100 others by far, at once after its end."""
    rows = [json.loads(line) for line in (DEMO_DATA_PATH / "snips-intent.jsonl").read_text().splitlines()]
    train, held_out = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in train)
    file = client.files.create(file=("intents.jsonl", content), purpose="fine-tune")
    method = {"type": "residual", "residual": {"hyperparameters": {"num_steps": 60, "batch_size": 16}}}
    began = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model=DEMO_MODEL_NAME, training_file=file.id, suffix="intents", seed=1, method=method,
        extra_body={"template": "{text}\nIntent:"},
    )  # type: ignore[call-overload]  # fmt: skip
    while job.status in ("queued", "running"):
        assert time.monotonic() - began < 300
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "intents"), job.error
    print(job.model_dump(), time.monotonic() - began)
    metrics = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert metrics and all(event.data["num_steps"] == 60 for event in metrics)
    bare, trained = accuracy(url, DEMO_MODEL_NAME, held_out, job), accuracy(url, "intents", held_out, job)
    print(bare, trained, time.monotonic() - began)
    assert trained > bare + 0.3


def accuracy(url: str, model: str, rows: list[dict[str, Any]], job: Any) -> float:
    """The share of rows whose label a model picks."""
    body: dict[str, Any] = {"model": model, "input": [row["text"] for row in rows]}
    if model == DEMO_MODEL_NAME:
        body |= {"input": [f"{row['text']}\nIntent:" for row in rows], "labels": job.label_words}
    reply = httpx.post(f"{url}/v1/classify", json=body, timeout=120)
    reply.raise_for_status()
    return sum(one["label"] == row["label"] for one, row in zip(reply.json()["data"], rows, strict=True)) / len(rows)
