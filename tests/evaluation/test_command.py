"""`promptd eval`: in this process and against a server, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from promptd.cli import app
from promptd.evaluation import TASKS, beam_search, read_rows
from promptd.evaluation.rows import items_of
from promptd.llm import LLM
from tests.api.conftest import LiveServer
from tests.evaluation.test_runner import LABELLED

DATA = Path(__file__).parents[1] / "data"


def run(*arguments: str) -> Result:
    """Run `promptd eval` in this process."""
    return CliRunner().invoke(app, ["eval", *arguments])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Labelled rows as a file."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({**example.fields, "label": example.label}) for example in LABELLED]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_the_table(tiny_models: dict[str, Path], prompt_files: dict[str, str], rows: str) -> None:
    """One line a subject, with the template and the label words under it."""
    options = ["--model", str(tiny_models["llama"]), "--data", rows, "--ensemble"]
    result = run(*options, "-p", prompt_files["c0"], "-p", prompt_files["c1"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if line.strip()]
    firsts = [" ".join(words[:2]) for words in lines]
    for subject in ("majority class", "bare model", "c0.safetensors", "c1.safetensors", "ensemble"):
        assert any(first.startswith(subject) for first in firsts), result.output
    assert "rows  12 rows, labels scored" in result.output
    assert "template '{text} is a'" in result.output
    assert "label words ' fox', ' lazy dog', ' river'" in result.output
    majority = next(words for words in lines if words[:2] == ["majority", "class"])
    assert majority[2] == "33.3"


def test_json_and_predictions(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """One JSON object a subject, that says everything that shaped the scores; every answer in a file."""
    answers = tmp_path / "answers.jsonl"
    options = ["--task", "copa", "--data", str(DATA), "--limit", "5", "--json", "--predictions", str(answers)]
    result = run("--model", str(tiny_models["llama"]), *options)
    assert result.exit_code == 0, result.output
    most, bare = (json.loads(line) for line in result.output.splitlines())
    assert (most["subject"], bare["subject"]) == ("majority class", "bare model")
    assert bare["task"] == "copa" and "taskless" in bare["convention"] and bare["num_rows"] == 5
    assert bare["template"].startswith("choice1: {choice1}") and bare["answer_by"] == "score"
    assert set(bare["metrics"]) == {"accuracy"} and bare["seconds"] > 0 and bare["prompt_versions"] == []
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [line["subject"] for line in lines] == ["majority class"] * 5 + ["bare model"] * 5
    right = sum(line["prediction"] in line["expected"] for line in lines[5:])
    assert bare["metrics"]["accuracy"] == pytest.approx(right / 5)


def test_a_server_is_asked_for_its_own_prompts(server: LiveServer, rows: str) -> None:
    """Names are the server's; the exact versions are in the result."""
    result = run("--url", server.url, "-p", "c2", "--data", rows, "--json")
    assert result.exit_code == 0, result.output
    named = json.loads(result.output.splitlines()[-1])  # the server's log is on the same stream
    with server.http() as http:
        assert named["prompt_versions"] == [http.get("/v1/prompts/c2").json()["version"]]


def test_mistakes_are_one_clear_line(server: LiveServer, rows: str, tmp_path: Path) -> None:
    """Status 1, and what is wrong, with its line or its name."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x", "label": "a"}\n{"text": "x"}\n')
    cases = {
        ("--data", str(bad), "--url", server.url): "line 2: needs exactly one of 'completion' and 'label'",
        ("--data", str(tmp_path / "absent")): "there is no such file or folder",
        ("--task", "glue", "--data", rows): "there is no task 'glue'",
        ("--data", rows, "--where", "user"): "--where takes FIELD=VALUE",
        ("--data", rows, "--url", server.url, "-p", "absent"): "prompt_not_found: no prompt 'absent'",
        ("--data", rows, "--url", "http://127.0.0.1:9"): "Is a server running",
        (): "no rows to evaluate on",
    }
    for arguments, message in cases.items():
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert message in result.output
        assert "Traceback" not in result.output


def test_beams_are_searched(tiny_models: dict[str, Path], server: LiveServer, tmp_path: Path) -> None:
    """`--beams` answers as the search itself does, and not as greedily; a server is not asked for them."""
    answers = tmp_path / "answers.jsonl"
    rows = ["--task", "e2e", "--data", str(DATA), "--limit", "3"]
    said = {}
    for beams in ("1", "3"):
        options = ["--model", str(tiny_models["llama"]), "--beams", beams, "--predictions", str(answers)]
        result = run(*options, *rows)
        assert result.exit_code == 0, result.output
        assert ("generated greedily" if beams == "1" else "generated with 3 beams") in result.output
        lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        said[beams] = [line["prediction"] for line in lines]
    llm, task = LLM(tiny_models["llama"]), TASKS["e2e"]
    texts = [item.example.fields["text"] + "\n" for item in items_of(read_rows(DATA, task, limit=3))]
    found = beam_search(llm, texts, [None] * len(texts), num_beams=3, max_tokens=task.max_tokens)
    assert said["3"] == [llm.model.decode(tokens).partition("\n")[0].strip() for tokens in found]
    assert said["1"] != said["3"]  # control
    refused = run("--url", server.url, "--beams", "3", *rows)
    assert (refused.exit_code, "num_beams must be 1 over a server, got 3" in refused.output) == (1, True)
