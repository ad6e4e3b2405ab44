"""`promptd train`: rows on this machine to prompts that a server takes."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import promptd
from promptd.cli import app
from promptd.commands import training_options
from promptd.commands.job_progress import Bars
from promptd.training import METHODS
from tests.clients.conftest import Live

LABELLED = [
    {"text": f"{'rain' if n % 2 else 'song'} number {n}", "label": ("music", "weather")[n % 2]} for n in range(20)
]
TEXTS = [{"prompt": f"count {n}", "completion": f" {n + 1}"} for n in range(20)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with the rows of three users, one of them compressed, and with bad ones."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, some in {"intent": LABELLED, "count": TEXTS, "bad": [*TEXTS, {"prompt": "x"}]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "zipped.jsonl.gz").write_bytes(gzip.compress((folder / "count.jsonl").read_bytes()))
    return folder


def run(model: Path, *arguments: object) -> Result:
    """Run `promptd train` in this process, quickly."""
    quick = ["-s", "batch_size=4", "-s", "num_evaluations=2"]
    if not any(str(one).startswith("num_steps") for one in arguments):
        quick += ["-s", "num_steps=4"]
    return CliRunner().invoke(app, ["train", *map(str, arguments), "--model", str(model), *quick])


def test_from_rows_to_a_server(live: Live, tiny_models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """Three files become three prompts in one run, with scores before and after; `prompts push` takes the folder, the
    server has the versions of the cards, and `promptd.LLM` answers under the files in one batch."""
    out = tmp_path / "out"
    files = [rows / "intent.jsonl", rows / "count.jsonl", rows / "zipped.jsonl.gz"]
    done = run(tiny_models["llama"], *files, "-o", out, "--seed", 3)
    assert done.exit_code == 0, done.output
    assert "intent: step 4 of 4  accuracy" in done.output and f"promptd prompts push {out}" in done.output
    cards = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(cards) == {"intent", "count", "zipped"}
    scores = cards["intent"]["provenance"]["scores"]
    line = next(line for line in done.output.splitlines() if line.split()[:1] == ["intent"])
    assert f"{scores['before']['accuracy']:.1%}" in line and f"{scores['after']['accuracy']:.1%}" in line
    assert cards["intent"]["provenance"]["seed"] == 3
    assert cards["intent"]["label_words"] == {"music": " music", "weather": " weather"}

    pushed = CliRunner().invoke(app, ["prompts", "push", str(out), "--json", "--no-resume", *live.options])
    assert pushed.exit_code == 0, pushed.output
    lines = [json.loads(line) for line in pushed.stdout.splitlines()]
    assert {line["name"]: line["version"] for line in lines} == {name: card["version"] for name, card in cards.items()}
    with live.client() as client:
        answer = client.classify(["song number 4"], model="intent")
        assert answer.data[0].label in ("music", "weather")
        for name in cards:
            client.prompts.delete(name)

    llm = promptd.LLM(tiny_models["llama"])
    prompts = [out / "intent.safetensors", out / "count.safetensors", None]
    assert len({one.text for one in llm.generate(["count 3"] * 3, prompts=prompts)}) == 3


def test_the_same_command_again(tiny_models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """What is there stays; other settings do not replace it unless they are told to; --json has everything."""
    command = [tiny_models["llama"], rows / "count.jsonl", "-o", tmp_path, "-n", "tone"]
    (first,) = [json.loads(line) for line in run(*command, "--json").stdout.splitlines()]
    assert (first["state"], first["error"]) == ("trained", None)
    (again,) = [json.loads(line) for line in run(*command, "--json").stdout.splitlines()]
    assert again == {**first, "state": "unchanged"}
    other = run(*command, "-s", "learning_rate=0.01")
    assert other.exit_code == 1 and "of other rows or settings" in other.output and "--overwrite" in other.output
    (new,) = [
        json.loads(line)
        for line in run(*command, "-s", "learning_rate=0.01", "--overwrite", "--json").stdout.splitlines()
    ]
    assert new["state"] == "trained" and new["version"] != first["version"]
    (start,) = [
        json.loads(line)
        for line in run(*command, "-n", "next", "--from", tmp_path / "tone.safetensors", "--json").stdout.splitlines()
    ]
    assert start["state"] == "trained"


def test_a_text_is_distilled(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A text becomes a prompt, taught on questions; the divergence from the teacher falls."""
    (tmp_path / "manual.txt").write_text("Close the door, always, and play some music in the city.")
    (tmp_path / "tone.jsonl").write_text("".join(json.dumps({"prompt": f"what {n}"}) + "\n" for n in range(12)))
    command = [
        tiny_models["llama"],
        "-o",
        tmp_path,
        "--distill",
        tmp_path / "manual.txt",
        "-s",
        "num_steps=30",
        "--json",
    ]
    (card,) = [json.loads(line) for line in run(*command, tmp_path / "tone.jsonl").stdout.splitlines()]
    scores = card["provenance"]["scores"]
    assert (card["name"], card["state"]) == ("tone", "trained")
    assert scores["after"]["loss"] < 0.8 * scores["before"]["loss"]
    nothing = CliRunner().invoke(app, ["train", "-o", str(tmp_path)])
    assert nothing.exit_code == 1 and "nothing to learn from" in nothing.output


def test_ctrl_c_saves(
    tiny_models: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends with 130 and leaves a checkpoint; the same command goes on from it."""
    command = [tiny_models["llama"], rows / "count.jsonl", "-o", tmp_path]
    before = signal.getsignal(signal.SIGINT)  # a run in the background may have been told to ignore it
    with monkeypatch.context() as patch:
        patch.setattr(Bars, "move", lambda self, name, told: told.step == 2 and signal.raise_signal(signal.SIGINT))
        stopped = run(*command)
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.output
    assert (tmp_path / "count.checkpoint").exists() and not (tmp_path / "count.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    done = run(*command)
    assert done.exit_code == 0 and "count: goes on after step 3" in done.output
    assert (tmp_path / "count.safetensors").exists() and not (tmp_path / "count.checkpoint").exists()


def test_a_bad_file_among_good_ones(tiny_models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """It is named with its line, status 1; the others are trained."""
    done = run(tiny_models["llama"], rows / "bad.jsonl", rows / "count.jsonl", "-o", tmp_path)
    assert done.exit_code == 1
    assert "FAIL  bad  line 21: needs exactly one of 'completion' and 'label'" in done.output
    assert (tmp_path / "count.json").exists() and not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["count.jsonl", "--method", "magic"], "method.type must be one of residual"),
        (["count.jsonl", "-s", "learning_rate=inf"], "learning_rate must be a positive number, got 'inf'"),
        (["count.jsonl", "-s", "rank=3"], "method.residual.hyperparameters.rank is not known"),
        (["count.jsonl", "-s", "num_steps"], "--set takes NAME=VALUE, got 'num_steps'"),
        (["count.jsonl", "--label", "a=x", "--label", "a=y"], "--label a is given twice"),
        (["count.jsonl", "--label", "a=x"], "label_words must name at least two labels"),
        (["count.jsonl", "--template", "{text"], "single '{'"),
        (["nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["count.jsonl", "count.jsonl"], "two files are named count"),
        (["count.jsonl", "intent.jsonl", "--name", "both"], "--name names one prompt, but there are 2 files"),
        (["count.jsonl", "--name", "a b"], "prompt name 'a b' must be"),
    ],
)
def test_what_needs_no_model_is_checked_first(rows: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    """Bad options and files end the command before a model is loaded; nothing is written."""
    files = [str(rows / one) if one.endswith(".jsonl") else one for one in arguments]
    done = run(tmp_path / "no-model", *files, "-o", tmp_path / "out")
    assert done.exit_code == 1 and told in done.output and "loading" not in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_the_options_know_all_methods() -> None:
    """The command line names them without importing them."""
    assert tuple(METHODS) == training_options.METHOD_NAMES


def test_new_lines_can_be_typed() -> None:
    r"""A template's `\n` is a new line, as shells leave it."""
    assert training_options.template_of(r"{text}\nMood:") == "{text}\nMood:"
