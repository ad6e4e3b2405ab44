"""From a plain text to virtual tokens in its place, and a user's prompt behind them: one server, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve

TEXT = "the restaurant near the river is cheap and the lazy dog plays some music for two people tomorrow"
ASK: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def live(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that trains in its spare time."""
    folder = tiny_models["llama"]
    settings = Settings(model=str(folder), store=str(tmp_path_factory.mktemp("learned")), drain_seconds=1)
    with serve(settings, folder) as live:
        yield live


def train(live: LiveServer, **body: Any) -> dict[str, Any]:
    """Start a job by OpenAI's SDK and wait for its end."""
    jobs = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0).fine_tuning.jobs
    settings = {"num_virtual_tokens": 12, "num_steps": 120, "batch_size": 16, "learning_rate": 0.2}
    method = {"type": "p_tuning_v2", "p_tuning_v2": {"hyperparameters": settings}}
    job = jobs.create(model="tiny-llama", training_file=None, extra_body={"method": method, **body})  # type: ignore[arg-type]
    ended = live.ended(job.id)
    assert ended["status"] == "succeeded", ended
    return ended


def tokens(http: httpx.Client, model: str) -> tuple[list[int], list[str], int]:
    """Return the answer, the versions and the virtual tokens of a request."""
    body = http.post("/v1/completions", json=ASK | {"model": model, "prompt": "is it"}).json()
    details = body["usage"]["prompt_tokens_details"]
    return body["choices"][0]["token_ids"], body["prompt_versions"], details["virtual_tokens"]


def test_a_text_becomes_virtual_tokens_and_a_base(live: LiveServer) -> None:
    """Publish, distill under its own name, train behind it; what was there before answers as before."""
    with live.http() as http:
        assert http.put("/v1/prompts/manual", json={"text": TEXT}).is_success
        text = tokens(http, "manual")
        asks = {"prompt": "manual", "num_rows": 160, "row_tokens": 8, "top_k": 32}
        distilled = train(live, suffix="manual", distill=asks)
        assert distilled["distill"]["prompt"] == f"default/manual@{text[1][0]}"
        scores = distilled["result"]["scores_before"]["loss"], distilled["result"]["scores_after"]["loss"]
        assert 0 < scores[1] < 0.6 * scores[0]
        learned = tokens(http, "manual")
        assert learned[1] == [distilled["result"]["version"]] and learned[2] == 12 < text[2]
        assert tokens(http, "manual@1") == text
        rows = [{"prompt": f"is it {number}", "completion": " a fox"} for number in range(40)]
        user = train(live, suffix="user", behind=["manual"], rows=rows)
        assert user["behind"] == [f"default/manual@{learned[1][0]}"]
        chain = tokens(http, "user")
        assert chain[1] == [*learned[1], user["result"]["version"]] and chain[2] == 24
        assert tokens(http, "manual") == learned and tokens(http, "manual@1") == text
        provenance = http.get("/v1/prompts/manual").json()["provenance"]["distilled"]
        assert provenance["teacher"] == text[1] and provenance["num_rows"] == 160
