"""From files of real rows to better prompts, as a user of OpenAI's SDK goes: upload, train, watch, ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_NAME
from tests.patience import until

ROWS = [json.loads(line) for line in (DEMO_DATA_PATH / "snips-intent.jsonl").read_text().splitlines()]
"""Of real people; the base model has not seen them, nor the prompts that are shipped."""
NUM_TRAIN, NUM_USERS = 200, 20
TEMPLATE = "{text} This is about the"
LABEL_WORDS = {
    "AddToPlaylist": " playlist", "BookRestaurant": " restaurant", "GetWeather": " weather", "PlayMusic": " music",
    "RateBook": " book", "SearchCreativeWork": " show", "SearchScreeningEvent": " movie",
}  # fmt: skip


@pytest.fixture
def client(demo_url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own."""
    with openai.OpenAI(base_url=f"{demo_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def method(name: str, **hyperparameters: float) -> dict[str, Any]:
    """A job's method."""
    return {"type": name, name: {"hyperparameters": hyperparameters}}


def ended(client: openai.OpenAI, job_id: str) -> Any:
    """Wait for a job's end."""
    seen: list[Any] = []

    def has_ended() -> bool:
        seen.append(client.fine_tuning.jobs.retrieve(job_id))
        return seen[-1].status not in ("queued", "running")

    until(has_ended, f"{job_id} ends", seconds=240, pause_seconds=0.1)
    return seen[-1]


def test_upload_train_ask(demo_url: str, client: openai.OpenAI) -> None:
    """A job on 200 voice commands beats the bare model on 100 others by far, at once after its end."""
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:NUM_TRAIN])
    file = client.files.create(file=("intents.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=DEMO_MODEL_NAME, training_file=file.id, suffix="intents", seed=1,
        method=method("p_tuning_v2", num_steps=30, batch_size=16, num_evaluations=2, learning_rate=0.2),
        extra_body={"template": TEMPLATE, "label_words": LABEL_WORDS},
    )  # type: ignore[call-overload]  # fmt: skip
    job = ended(client, job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "intents"), job.error

    held_out = ROWS[NUM_TRAIN:]
    bare = accuracy(demo_url, held_out, {"model": DEMO_MODEL_NAME, "labels": LABEL_WORDS}, TEMPLATE)
    assert accuracy(demo_url, held_out, {"model": "intents"}) > bare + 0.3
    assert job.result["scores_after"]["accuracy"] > job.result["scores_before"]["accuracy"] + 0.3
    answer = client.completions.create(model="intents", prompt=held_out[0]["text"], max_tokens=1)
    assert answer.model_extra is not None and answer.model_extra["prompt_versions"] == [job.result["version"]]

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))[::-1]  # through all pages
    states = [event.data["state"] for event in events if isinstance(event.data, dict) and "state" in event.data]
    assert states == ["queued", "running", "succeeded"]
    losses = [event.data["validation_loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
    measured = [loss for loss in losses if loss is not None]
    assert len(measured) == 2 and measured[-1] < measured[0]
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == "intents@1"


def accuracy(demo_url: str, rows: list[dict[str, Any]], asked: dict[str, Any], template: str = "{text}") -> float:
    """The share of rows whose label comes back; a prompt knows its template and its labels itself."""
    texts = [template.replace("{text}", row["text"]) for row in rows]
    reply = httpx.post(f"{demo_url}/v1/classify", json={"input": texts, **asked}, timeout=120)
    reply.raise_for_status()
    return sum(one["label"] == row["label"] for one, row in zip(reply.json()["data"], rows, strict=True)) / len(rows)


def test_twenty_users_in_one_call(demo_url: str, client: openai.OpenAI) -> None:
    """Rows of many users in one call, a prompt for each: every user's next request is answered by the own one."""
    share = len(ROWS) // NUM_USERS
    jobs = [{"name": f"user-{n}", "rows": ROWS[n * share : (n + 1) * share]} for n in range(NUM_USERS)]
    defaults = {"method": method("residual", num_steps=3, batch_size=4), "publish_worse": True}
    defaults |= {"template": TEMPLATE, "label_words": LABEL_WORDS}
    reply = httpx.post(f"{demo_url}/admin/training/jobs", json={"defaults": defaults, "jobs": jobs}, timeout=60)
    assert reply.status_code == 207 and [one["status"] for one in reply.json()["data"]] == [200] * NUM_USERS, reply.text
    made = [ended(client, one["job"]["id"]) for one in reply.json()["data"]]
    assert [job.fine_tuned_model for job in made] == [job["name"] for job in jobs], [job.error for job in made]

    def ask(job: Any) -> list[str]:
        answer = client.completions.create(model=job.fine_tuned_model, prompt="play some jazz", max_tokens=1)
        return (answer.model_extra or {})["prompt_versions"]

    with ThreadPoolExecutor(NUM_USERS) as pool:  # all at once: their prompts share batches
        versions = list(pool.map(ask, made))
    assert versions == [[job.result["version"]] for job in made]
    assert len({version for (version,) in versions}) == NUM_USERS
