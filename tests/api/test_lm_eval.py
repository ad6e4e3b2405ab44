"""lm-evaluation-harness's `local-completions` runs a task on a learned prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_store import encode

from promptd.llm import LLM
from tests.api.conftest import LiveServer

WORDS = [" fox", " dog"]
TEXTS = ["the quick brown", "a cheap restaurant near the", "play some", "what is the weather", "over the lazy"]


@pytest.mark.filterwarnings("ignore")  # the harness and its data library warn about themselves
def test_a_task_runs_on_a_prompt(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiple-choice task scored over HTTP gives the answers that the engine gives in process, under the prompt and
    not under the bare model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    from lm_eval import simple_evaluate

    artifact = encode("soft", -2 * server.model.embed(torch.tensor([7, 40, 90, 120])))
    with server.http() as http:
        assert http.put("/v1/prompts/evaluated", content=artifact.content).status_code == 201
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
