"""Prompts that carry a classification head are measured by what it says, in this process and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_client import Client
from promptd_store import PromptArtifact, encode
from typer.testing import CliRunner

from promptd.cli import app
from promptd.errors import InvalidRequestError
from promptd.evaluation import MAJORITY_CLASS
from promptd.llm import LLM
from promptd.settings import Settings
from promptd.training import Example, TrainingDataError
from tests.api.conftest import LiveServer, serve
from tests.engine.encoder_oracle import random_head
from tests.engine.harness import frozen
from tests.evaluation.conftest import written
from tests.evaluation.test_runner import TEXTS, labels, run

LABELS = ("fox", "dog", "river")
ROWS = [Example({"text": text}, None, LABELS[at % 3], at + 1) for at, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def prompts(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptArtifact]:
    """Two prompts with a head of three classes, and one without."""
    spec, generator = frozen(tiny_encoders["bert-plain"]).spec, torch.Generator().manual_seed(4)
    made = {}
    for name in ("h0", "h1"):
        head = random_head("bert", spec.hidden_size, 3, generator)
        soft = torch.randn(3, spec.hidden_size, generator=generator)
        made[name] = encode("soft", {"prompt_embeddings": soft, **head}, labels=LABELS)
    return made


@pytest.fixture(scope="module")
def files(prompts: dict[str, PromptArtifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same as files."""
    return written(prompts, tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def server(
    tiny_encoders: dict[str, Path], prompts: dict[str, PromptArtifact], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """An encoder with these prompts."""
    folder = tiny_encoders["bert-plain"]
    settings = Settings(model=str(folder), store=str(tmp_path_factory.mktemp("store")), training="off", drain_seconds=1)
    with serve(settings, folder, prompts={name: one.content for name, one in prompts.items()}) as live:
        yield live


def told(llm: LLM, artifact: PromptArtifact) -> list[str]:
    """What one prompt's head says of each text, asked for alone."""
    logits = [llm.pool([text], "classes", [artifact])[0] for text in TEXTS]
    return [LABELS[row.index(max(row))] for row in logits]


def test_heads_answer_in_one_run(
    tiny_encoders: dict[str, Path], prompts: dict[str, PromptArtifact], files: dict[str, str]
) -> None:
    """Both heads and their vote; no bare model, which has no head; what a head cannot do is refused."""
    llm = LLM(frozen(tiny_encoders["bert-plain"]))
    most, *heads, ensemble = run(llm, ROWS, [None, files["h0"], files["h1"]], ensemble=True)
    assert most.subject == MAJORITY_CLASS and len(heads) == 2
    expected = [told(llm, prompts[name]) for name in ("h0", "h1")]
    assert [labels(head) for head in heads] == expected
    assert expected[0] != expected[1]  # control: the heads differ
    for head, answers in zip(heads, expected, strict=True):
        right = sum(answer == row.label for answer, row in zip(answers, ROWS, strict=True))
        assert head.metrics["accuracy"] == pytest.approx(right / len(ROWS))
        assert head.label_words is None
    assert set(labels(ensemble)) <= set(LABELS)
    with pytest.raises(InvalidRequestError, match="told by a head"):
        run(llm, ROWS, [files["h0"]], answer_by="generate")
    with pytest.raises(TrainingDataError, match="line 1: label 'cat' is no class of the head of"):
        run(llm, [Example({"text": "a"}, None, "cat", 1), *ROWS[1:]], [files["h0"]])


def test_over_http_and_in_the_terminal(
    server: LiveServer, prompts: dict[str, PromptArtifact], files: dict[str, str], tmp_path: Path
) -> None:
    """The route, the client and `promptd eval`, here and over a server, say the same; there is no bare model."""
    llm = LLM(frozen(server.folder))
    rows: list[dict[str, Any]] = [{"text": row.fields["text"], "label": row.label} for row in ROWS]
    with server.http() as http:
        asked = {"rows": rows, "return_predictions": True}
        answer = http.post("/v1/prompts/h1/evaluate", json=asked)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["bare_model"] is None and found["majority_class"] is not None
    assert [row["prediction"] for row in found["prompt"]["predictions"]] == told(llm, prompts["h1"])
    with Client(server.url) as client:
        measured = client.prompts.evaluate("h1", rows)
    assert measured.bare_model is None and measured.prompt.metrics == pytest.approx(found["prompt"]["metrics"])
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for options in (["-p", "h1", "--url", server.url], ["-p", files["h1"], "--model", str(server.folder)]):
        shown = CliRunner().invoke(app, ["eval", *options, "--data", str(data), "--json"])
        assert shown.exit_code == 0, shown.output
        lines = [json.loads(line) for line in shown.stdout.splitlines()]
        assert [line["subject"] for line in lines] == [MAJORITY_CLASS, options[1]]
        assert lines[1]["metrics"] == pytest.approx(found["prompt"]["metrics"])
    table = CliRunner().invoke(app, ["eval", "-p", "h1", "--url", server.url, "--data", str(data)])
    assert table.exit_code == 0 and "against bare" not in table.stdout
