"""SuperGLUE: rows as published in two formats, halves that never mix, runs that go on, tables of what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from promptd_store import render_template

from promptd.llm import LLM
from promptd.modeling import load_model
from promptd.training import MethodConfig
from tests.bench.experiments.__main__ import main
from tests.bench.experiments.cells import Cell, Results
from tests.bench.experiments.plans import FULL_TUNING, LORA, PT, RPT, SMOKE
from tests.bench.experiments.run import Laboratory
from tests.bench.experiments.superglue import RATES, Asked, plan, run_all
from tests.bench.experiments.superglue_sets import SUPERGLUE, TITLES, count_rows, load_halves
from tests.bench.experiments.superglue_tables import tables_of
from tests.bench.experiments.weights import WeightConfig
from tests.tiny_models import make_tiny_model

AS_TEXT = {
    "boolq": "passage: The cancellation of The Border was announced by the CBC after three seasons were aired. "
    "question: is there going to be a season 4 of the border",
    "cb": "hypothesis: it rains premise: It may rain.",
    "copa": "choice1: The sun was rising. choice2: The grass was cut. premise: My body cast a shadow over the grass. "
    "question: cause",
    "multirc": "question: Who sang? answer: Ann paragraph: Sent 1: Ann sang. Bob slept.",
    "rte": "hypothesis: Water falls. premise: It rains.",
    "wic": "sentence1: The bank. sentence2: A bank. word: bank",
    "wsc": "The fish ate the worm . *It* was tasty.",
}
TARGETS = {
    "boolq": " False", "cb": " neutral", "copa": " choice1", "multirc": " True", "rte": " entailment", "wic": " True",
    "wsc": " The worm",
}  # fmt: skip
UNDER_HEAD = {
    "boolq": "The cancellation of The Border was announced by the CBC after three seasons were aired. [SEP] is there "
    "going to be a season 4 of the border",
    "cb": "It may rain. [SEP] it rains",
    "copa": "The sun was rising. [SEP] The grass was cut. [SEP] My body cast a shadow over the grass. [SEP] cause",
    "multirc": "Who sang? [SEP] Ann [SEP] Sent 1: Ann sang. Bob slept.",
    "rte": "It rains. [SEP] Water falls.",
    "wic": "The bank. [SEP] A bank. [SEP] bank",
    "wsc": "The fish ate the worm . *It* was tasty. [SEP] The worm",
}


def test_rows_read_as_published_in_both_formats(superglue_data: Path) -> None:
    """The first training row of every task: text and target of the text-to-text transformer, fields under a head."""
    for name, text in AS_TEXT.items():
        target, chosen = TARGETS[name], SUPERGLUE[f"{name}-text"]
        rows = load_halves(chosen, superglue_data, 0, num_train=99, num_validation=99, num_held_out=99).train
        (row,) = (row for row in rows if render_template(chosen.task.template, row.fields) == text)
        said = row.completion if name == "wsc" else (chosen.task.label_words or {})[row.label or ""]
        assert said == target
    for name, text in UNDER_HEAD.items():
        chosen = SUPERGLUE[f"{name}-head"]
        rows = load_halves(chosen, superglue_data, 0, num_train=99, num_validation=99, num_held_out=99).train
        (row,) = (row for row in rows if render_template(chosen.task.template, row.fields) == text)
        assert row.label in (chosen.task.label_words or {})
    assert set(AS_TEXT) == set(UNDER_HEAD) == set(TITLES) - {"record"}


def test_rows_are_counted_and_missing_files_named(superglue_data: Path) -> None:
    """MultiRC counts answers; ReCoRD, of which there is nothing, says what is not there."""
    counts = count_rows(superglue_data)
    missing = counts.pop("record")
    assert isinstance(missing, str) and "superglue_record/train.jsonl" in missing
    assert counts == {
        **{name: {"train": 6, "validation": 6} for name in ("cb", "rte", "wic")},
        "boolq": {"train": 10, "validation": 12},
        "copa": {"train": 16, "validation": 16},
        "wsc": {"train": 12, "validation": 12},
        "multirc": {"train": 18, "validation": 18},
    }


@pytest.mark.parametrize("how", ["text", "head"])
def test_halves_never_mix(superglue_data: Path, how: str) -> None:
    """One half selects, the other reports, for every seed the same; MultiRC's paragraphs stay whole; both formats have
    the same rows in each half; the seed draws what trains; generated labels are taught by positive rows."""
    for name in set(TITLES) - {"record"}:
        chosen = SUPERGLUE[f"{name}-{how}"]
        counts = {"num_train": 5, "num_validation": 99, "num_held_out": 99}
        first, second = (load_halves(chosen, superglue_data, seed, **counts) for seed in (0, 1))
        assert (first.validation, first.held_out) == (second.validation, second.held_out)
        selects, reports = ({example.line for example in part} for part in (first.validation, first.held_out))
        assert selects and reports and not selects & reports
        assert [example.line for example in first.train] != [example.line for example in second.train]
        other = SUPERGLUE[f"{name}-{'head' if how == 'text' else 'text'}"]
        twin = load_halves(other, superglue_data, 0, **counts)
        assert {example.line for example in twin.held_out} == reports
        if (name, how) == ("wsc", "text"):
            assert all(example.completion for example in (*first.train, *first.validation))
            assert {example.label for example in first.held_out} == {"true", "false"}
    few = load_halves(SUPERGLUE["multirc-text"], superglue_data, 0, num_train=5, num_validation=1, num_held_out=4)
    questions = {(row.fields["paragraph"], row.fields["question"]) for row in few.held_out}
    assert len(few.held_out) >= 4 and len(questions) < len(few.held_out)  # whole questions


def _asked(how: Any, tasks: tuple[str, ...], learners: tuple[str, ...], num_seeds: int = 2) -> Asked:
    return Asked(dataclasses.replace(SMOKE, num_seeds=num_seeds), how, tasks, learners)


def test_an_interrupted_run_goes_on_and_does_nothing_twice(
    long_encoder: Path, superglue_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after four results, the same call does the rest; all rates have run with seed 0, the best with both."""
    model, results = load_model(long_encoder), Results(tmp_path / "out")
    asked = _asked("head", ("copa", "record", "wsc"), (PT, FULL_TUNING))
    put: list[str] = []
    whole, stop_after = Results.put, 4

    def noted(self: Results, cell: Cell, result: Mapping[str, Any]) -> None:
        if len(put) == stop_after:
            raise KeyboardInterrupt
        whole(self, cell, result)
        put.append(cell.file_name)

    rounds, run = iter(range(20)), Laboratory.run  # more than there are

    def bounded(self: Laboratory, *given: Any) -> bool:
        next(rounds)  # raises where a run goes round without end
        return run(self, *given)

    monkeypatch.setattr(Laboratory, "run", bounded)
    monkeypatch.setattr(Results, "put", noted)
    with pytest.raises(KeyboardInterrupt):
        run_all(Laboratory(long_encoder, superglue_data, results, LLM(model)), results, superglue_data, asked, None)
    stop_after = 99
    assert run_all(Laboratory(long_encoder, superglue_data, results, LLM(model)), results, superglue_data, asked, None)
    assert len(put) == len(set(put)) == 2 * 2 * (len(RATES[PT]) + 1)
    assert {name.split("/")[0] for name in put} == {"copa-head", "wsc-head"}
    before = list(put)
    assert run_all(Laboratory(long_encoder, superglue_data, results, LLM(model)), results, superglue_data, asked, None)
    assert put == before
    late = Results(tmp_path / "other")
    laboratory = Laboratory(long_encoder, superglue_data, late, LLM(model))
    assert not run_all(laboratory, late, superglue_data, asked, 0.0)  # its time is up
    assert put == before


def test_the_command_runs_a_model_that_writes_and_fills_the_page(
    superglue_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder: COPA by its label words, WSC generated. The table names every task, ReCoRD as not available; tables of
    other results stay."""
    folder = make_tiny_model(tmp_path / "tiny-llama-long", max_positions=1200)
    common = ["--smoke", "--model", str(folder), "--folder", str(tmp_path / "out")]
    tasks = ["--tasks", "copa", "wsc", "--learners", PT, LORA]
    main(["superglue", "--data", str(superglue_data), *common, *tasks])
    said = capsys.readouterr().out
    assert "ReCoRD: not available" in said and "superglue_record/train.jsonl" in said
    (made,) = (tmp_path / "out").iterdir()
    wsc = [json.loads(path.read_text()) for path in (made / "wsc-text").iterdir()]
    assert len(wsc) == len(RATES[PT]) + len(RATES[LORA]) + 1  # rates, and the bare model
    assert all(set(result["held_out"]["metrics"]) == {"accuracy"} for result in wsc)
    page = tmp_path / "page.md"
    marks = "".join(f"<!-- begin {name} -->\nold {name}\n<!-- end {name} -->\n" for name in ("core", "superglue"))
    page.write_text(marks)
    main(["report", *common, "--page", str(page)])
    text = page.read_text()
    assert "old core" in text and "old superglue" not in text
    header, *lines = (line for line in text.splitlines() if line.startswith("|"))
    assert header.split(" | ")[1:9] == list(TITLES.values())
    (tuned,) = (line.split(" | ") for line in lines if line.startswith(f"| {PT} |"))
    assert tuned[5] == "not available" and tuned[1] == "-"
    copa = json.loads(next((made / "copa-text").glob("lora-*")).read_text())
    assert 0 <= copa["held_out"]["score"] <= 1 and copa["rows"] == {"train": 8, "select": 4, "report": 4}
    for plot in ("superglue.png", "superglue_curves.png"):
        assert (page.with_suffix("") / plot).read_bytes().startswith(b"\x89PNG")


def _filled(asked: Asked, results: Results, selected: Any, reported: Any) -> None:
    """Give every cell of a plan, as it grows, a made-up result."""
    while missing := [cell for _, cell in plan(asked, results) if results.get(cell) is None]:
        for cell in missing:
            results.put(
                cell,
                {
                    "curve": [[1, 9.0, 9.0, 0.0], [2, 1.0, 1.0, selected(cell)]],
                    "best_step": 2,
                    "stored_bytes": 4,
                    "cpu_seconds": 1.0,
                    "train_tokens": 1,
                    "held_out": {"score": reported(cell), "metrics": {"accuracy": 1.0, "macro_f1": 0.0}},
                    "constant": 0.5,
                    "rows": {"train": 8, "select": 4, "report": 4},
                },
            )


def _rate(cell: Cell) -> float:
    assert isinstance(cell.learner, MethodConfig | WeightConfig)
    return cell.learner.learning_rate


def test_rates_are_chosen_on_selecting_rows_and_gaps_are_paired(tmp_path: Path) -> None:
    """The last rate selects best and reports worst: it is taken. Residual is 10 points ahead in one task and seed,
    20 in the others."""
    results, asked = Results(tmp_path), _asked("head", ("boolq", "cb", "record"), (PT, RPT, FULL_TUNING))

    last = {RATES[label][-1] for label in asked.learners}

    def selected(cell: Cell) -> float:
        return 0.9 if _rate(cell) in last else 0.5

    def reported(cell: Cell) -> float:
        base = 0.1 if _rate(cell) in last else 0.9
        ahead = 0.1 if (cell.task, cell.seed) == ("boolq-head", 1) else 0.2
        return base + (ahead if cell.learner.name == "residual" else 0.0)

    _filled(asked, results, selected, reported)
    (tmp_path / "superglue.json").write_text(json.dumps({"boolq": {"train": 1000, "validation": 3270}}))
    made = tables_of(asked, results, {"model": "made up"})
    lines = [line.strip("| ").split(" | ") for line in made["superglue"].splitlines()]
    assert ["published rows: train", "1,000", *["not available"] * 7] == lines[2][:9]
    plain = next(line for line in lines if line[0] == PT)
    assert plain[1].startswith("10.0 ± 0.0")
    gain = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in made["superglue_gain"].splitlines()}
    assert gain["BoolQ"].startswith("15.0 ±") and gain["CB"] == "20.0 ± 0.0"
    assert gain["**mean**, 95 % interval over seeds"] == "17.5 ± 31.8"  # 20 and 15: 12.706 * 3.5355 / sqrt(2)
    assert gain["better, of all pairs of a task and a seed"] == "4 of 4, equal in 0"
    assert f"| {PT} | {RATES[PT][-1]:g} | **90.0** | **90.0** |" in made["superglue_rates"]
