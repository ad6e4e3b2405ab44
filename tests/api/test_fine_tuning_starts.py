"""What a job begins with: a prompt to go on from, a chain to stand behind, a text to distill; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from promptd_store import PromptKind, encode

from promptd.jobs import JobClaims
from tests.api.conftest import MODEL
from tests.api.test_fine_tuning import ROWS, jsonl
from tests.api.training_server import TrainingServer
from tests.engine.harness import library

pytestmark = pytest.mark.usefixtures("no_open_jobs")


def test_start_from_a_prompt(trainer: TrainingServer) -> None:
    """A job may start from a prompt, named as the model or beside it; the version is the one of now."""
    with trainer.http() as http:
        version = http.get("/v1/prompts/p0").json()["version"]
        for fields in ({"model": "p0"}, {"model": f"{MODEL}:p0"}, {"model": MODEL, "base_prompt": "p0@1"}):
            job = http.post("/v1/fine_tuning/jobs", json={**fields, "rows": ROWS}).json()
            assert (job["base_prompt"], job["model"]) == (f"acme/p0@{version}", MODEL)
        both = http.post("/v1/fine_tuning/jobs", json={"model": "p0", "base_prompt": "p0", "rows": ROWS})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "base_prompt")
    with trainer.http("eve") as http:
        foreign = http.post("/v1/fine_tuning/jobs", json={"model": "p0", "rows": ROWS})
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (404, "model")


def test_train_behind_prompts(trainer: TrainingServer) -> None:
    """The chain is pinned to the versions of now; its task reads on in the new prompt unless the job names its own."""
    words = {"yes": " y", "no": " n"}
    task = encode(PromptKind.TEXT, None, text="Answer yes or no.", template="{text} so:", label_words=words)
    with trainer.http() as http:
        version = http.get("/v1/prompts/p0").json()["version"]
        assert http.put("/v1/prompts/task", content=task.content).status_code == 201
        job = http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "behind": ["p0@1", "task"], "rows": ROWS}).json()
        assert job["behind"] == [f"acme/p0@{version}", f"acme/task@{task.version}"]
        assert (job["base_prompt"], job["template"], job["label_words"]) == (None, "{text} so:", words)
        own = {"model": MODEL, "behind": ["task"], "rows": ROWS, "template": "{text}?"}
        assert http.post("/v1/fine_tuning/jobs", json=own).json()["template"] == "{text}?"
        assert http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "rows": ROWS}).json()["behind"] == []
        segment = library(trainer.live.folder)[2].content
        put = http.put("/v1/prompts/mine", content=segment, params={"behind": ["p0", "task"]})
        assert put.status_code == 201 and put.json()["behind"] == job["behind"]
        again = http.post("/v1/fine_tuning/jobs", json={"model": "mine", "rows": ROWS}).json()
        assert again["behind"] == job["behind"] and again["base_prompt"].startswith("acme/mine@")
        alone = http.post("/v1/fine_tuning/jobs", json={"model": "mine", "rows": ROWS, "behind": []}).json()
        assert alone["behind"] == []
        text = http.post("/v1/fine_tuning/jobs", json={"model": "task", "rows": ROWS})
        assert (text.status_code, text.json()["error"]["param"]) == (400, "base_prompt")
    with trainer.http("eve") as http:
        foreign = http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "behind": ["acme/p0"], "rows": ROWS})
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (404, "behind")


def test_each_of_many_jobs_names_its_own_start(trainer: TrainingServer) -> None:
    """Base prompts and chains may differ from job to job; a bad one refuses its own job alone."""
    jobs = [
        {"name": "u0", "behind": ["p0"]},
        {"name": "u1", "base_prompt": "p1", "behind": ["p0", "p2"]},
        {"name": "u2", "behind": ["p0", "nobody"]},
        {"name": "u3"},
    ]
    artifacts = library(trainer.live.folder)
    with trainer.http("admin") as http:
        for number in range(3):
            assert http.put(f"/v1/prompts/p{number}", content=artifacts[number].content).status_code == 201
        done = http.post("/admin/training/jobs", json={"defaults": {"rows": ROWS, "behind": ["p1"]}, "jobs": jobs})
    assert done.status_code == 207
    results = done.json()["data"]
    assert [one["status"] for one in results] == [200, 200, 404, 200]
    assert results[2]["error"]["param"] == "behind" and "nobody" in results[2]["error"]["message"]
    fronts = [[name.partition("@")[0] for name in one["job"]["behind"]] for one in results if "job" in one]
    assert fronts == [["default/p0"], ["default/p0", "default/p2"], ["default/p1"]]
    assert results[1]["job"]["base_prompt"].startswith("default/p1@")


def test_distill(trainer: TrainingServer) -> None:
    """A text, a stored prompt, questions or none: one call, and the teacher's exact version stands in the job."""
    questions = [{"prompt": f"row {number}"} for number in range(4)] + [
        {"messages": [{"role": "user", "content": "hi"}]}
    ]
    document = "A long document. " * 100
    words = {"yes": " y", "no": " n"}
    task = encode(PromptKind.TEXT, None, text="Answer yes or no.", template="{text} so:", label_words=words)
    with trainer.http() as http:
        assert http.put("/v1/prompts/task", content=task.content).is_success
        asks = {"text": document, "num_rows": 100}
        alone = http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "distill": asks}).json()
        assert alone["training_file"] is None and alone["distill"] == asks | {"text": document[:200] + "…"}
        body = {"model": MODEL, "rows": questions, "distill": {"prompt": "task", "answer_tokens": 3}}
        asked = http.post("/v1/fine_tuning/jobs", json=body).json()
        assert asked["distill"] == {"prompt": f"acme/task@{task.version}", "answer_tokens": 3}
        assert (asked["template"], asked["label_words"]) == ("{text} so:", words)  # what it says, it says to the task
        nothing = http.post("/v1/fine_tuning/jobs", json={"model": MODEL})
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "training_file")

    async def look(worker: JobClaims) -> dict[str, tuple[Any, bytes]]:
        claims = await worker.claim(100)
        found = {claim.job.id: (claim.job.spec.distill, (await worker.data(claim)).training) for claim in claims}
        for claim in claims:
            await worker.release(claim)
        return found

    found = trainer.work(look)
    assert found[alone["id"]] == (asks, b"")  # the text is whole again
    assert found[asked["id"]][1] == jsonl(questions)
