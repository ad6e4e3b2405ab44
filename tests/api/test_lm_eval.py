"""lm-evaluation-harness's `local-completions` runs a task on a learned prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_store import PromptArtifact, encode

from promptd.llm import LLM
from tests.api.conftest import LiveServer

WORDS = [" fox", " dog"]
TEXTS = ["the quick brown", "a cheap restaurant near the", "play some", "what is the weather", "over the lazy"]


@pytest.fixture
def artifact(server: LiveServer) -> Iterator[PromptArtifact]:
    """A prompt under which the answers are others."""
    made = encode("soft", -2 * server.model.embed(torch.tensor([7, 40, 90, 120])))
    with server.http() as http:
        assert http.put("/v1/prompts/evaluated", content=made.content).status_code == 201
        yield made
        assert http.delete("/v1/prompts/evaluated").status_code == 200


def test_what_the_harness_asks(server: LiveServer, artifact: PromptArtifact) -> None:
    """Its own request for a text and a word: tokens in, echoed with their log-probabilities, the word's at the end."""
    model = server.model
    scores = LLM(model).score(TEXTS, WORDS, [artifact] * len(TEXTS))
    asked = {"model": "evaluated", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    with server.http() as http:
        for text, expected in zip(TEXTS, scores, strict=True):
            words = [model.encode(word, add_special_tokens=False) for word in WORDS]
            prompts = [[*model.encode(text), *word] for word in words]
            choices = http.post("/v1/completions", json={**asked, "prompt": prompts}).json()["choices"]
            found = [
                sum(choice["logprobs"]["token_logprobs"][len(prompt) - len(word) : len(prompt)])
                for choice, prompt, word in zip(choices, prompts, words, strict=True)
            ]
            assert found == pytest.approx(list(expected), abs=1e-3)
    assert len({score[0] > score[1] for score in scores}) == 2  # the control: not always the same word


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the harness and its data library warn about themselves
def test_a_task_runs_on_a_prompt(
    server: LiveServer, artifact: PromptArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiple-choice task scored over HTTP gives the answers that the engine gives in process, under the prompt and
    not under the bare model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    from lm_eval import simple_evaluate

    scores = LLM(server.model).score(TEXTS, WORDS, [artifact] * len(TEXTS))
    data = tmp_path / "data.jsonl"
    rows = [{"text": text, "answer": int(score[1] > score[0])} for text, score in zip(TEXTS, scores, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: dict[str, Any] = {
        "task": "fox_or_dog",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": [word.strip() for word in WORDS],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    arguments = f"model=evaluated,base_url={server.url}/v1/completions,tokenizer={server.folder},num_concurrent=1"
    found = simple_evaluate(model="local-completions", model_args=arguments, tasks=[task], bootstrap_iters=0)
    assert found is not None
    assert found["results"]["fox_or_dog"]["acc,none"] == 1.0
    samples = found["samples"]["fox_or_dog"]
    for sample, score in zip(sorted(samples, key=lambda s: s["doc_id"]), scores, strict=True):
        assert [float(r[0]) for r in sample["filtered_resps"]] == pytest.approx(list(score), abs=1e-3)
