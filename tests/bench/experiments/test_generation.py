"""Generation on few rows: published splits stay apart, trainings end where they no longer gain, tables of results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from promptd.modeling import FrozenModel, load_model
from promptd.training import Encoded, TrainingConfig, objective_for
from tests.bench.experiments.__main__ import main
from tests.bench.experiments.cells import Results
from tests.bench.experiments.generation import LEARNERS, Asked, cell_of, plan
from tests.bench.experiments.generation_tables import tables_of
from tests.bench.experiments.plain import plain_of
from tests.bench.experiments.plans import FULL, FULL_TUNING, PREFIX, SMOKE
from tests.bench.experiments.run import Laboratory
from tests.bench.experiments.text_sets import TEXT_SETS, load_published
from tests.bench.experiments.weights import WeightConfig, tune_weights
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows in the layouts of the published ones."""
    folder = tmp_path_factory.mktemp("texts")
    pairs = {
        split: [
            {"input": f"name[{split} {n}]", "target": f"{split} {n} is a {kind}."}
            for n in range(6)
            for kind in ("pub", "bar")
        ]
        for split in ("train", "validation", "test")
    }
    triples = {
        split: [
            {"input": f"{split}_{n} : is : pub", "targets": [f"{split} {n} is a pub.", f"A pub is {split} {n}."]}
            for n in range(6)
        ]
        for split in ("train", "validation", "test")
    }
    for n, row in enumerate(triples["test"]):
        row["seen"] = n % 2 == 0  # type: ignore[assignment]
    for name, splits in (("e2e_nlg", pairs), ("webnlg2017", triples)):
        (folder / name).mkdir()
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


def test_published_splits_stay_apart(data: Path) -> None:
    """Training rows are the seed's; an input that selects has one reference, one that reports has all; WebNLG's seen
    and unseen rows never mix, and names have spaces."""
    counts = {"num_train": 5, "num_validation": 4, "num_held_out": 3}
    for name in ("e2e-texts", "webnlg-texts"):
        rows, other = (load_published(TEXT_SETS[name], data, seed, **counts) for seed in (0, 1))
        assert [len(part) for part in (rows.train, rows.validation, rows.held_out)] == [5, 4, 6]
        assert (rows.validation, rows.held_out) == (other.validation, other.held_out)
        assert rows.train != other.train
        assert len({row.fields["text"] for row in rows.validation}) == len(rows.validation)
        for part, split in ((rows.train, "train"), (rows.validation, "validation"), (rows.held_out, "test")):
            assert all(split in row.fields["text"] and "_" not in row.fields["text"] for row in part)
    everything = {"num_train": 0, "num_validation": 0, "num_held_out": 99}
    seen, unseen = (
        {row.fields["text"] for row in load_published(TEXT_SETS[name], data, 0, **everything).held_out}
        for name in ("webnlg-texts", "webnlg-unseen")
    )
    assert len(seen) == len(unseen) == 3 and not seen & unseen


def test_all_rows_are_those_that_the_steps_can_read() -> None:
    """Twice the steps, each of their rows once; fewer rows have the steps of the set."""
    asked = Asked(FULL)
    few, many = (cell_of(asked, "e2e-texts", size, LEARNERS[PREFIX][1e-3]) for size in (50, None))
    assert (few.num_train, few.num_steps) == (50, 160)
    assert (many.num_train, many.num_steps) == (8 * 320, 320)
    assert few.num_evaluations == 16 and few.patience == many.patience == 4
    assert len({cell.file_name for _, cell in plan(asked, Results(Path("nowhere")))}) == 3 + 9 * 12


def _tuned(model: FrozenModel, folder: Path, patience: int | None) -> Any:
    rows = [Encoded((n + 1, 7), (n % 5 + 9, 3), None) for n in range(20)]  # type: ignore[arg-type]
    objective = objective_for(model, TEXT_SETS["e2e-texts"].format)
    training = TrainingConfig(num_steps=24, batch_size=4, num_evaluations=24, schedule="constant", patience=patience)
    plain = plain_of(model, folder)
    _, descent = tune_weights(plain, WeightConfig("full", 0.03), training, objective, rows[:10], rows[10:])
    return descent


def test_changed_weights_end_where_they_no_longer_gain(tmp_path: Path) -> None:
    """With patience the same curve ends that many evaluations behind its best; without, it goes on to the last step."""
    folder = make_tiny_model(tmp_path / "tiny")
    model = load_model(folder)
    whole, patient = _tuned(model, folder, None), _tuned(model, folder, 2)
    assert len(whole.curve) == 24 > len(patient.curve)
    assert patient.curve == whole.curve[: len(patient.curve)]
    losses = [point[2] for point in patient.curve]
    assert patient.best_step == losses.index(min(losses)) + 1 == len(losses) - 2


def test_the_command_goes_on_and_fills_the_page(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare model, a prefix and changed weights write what WebNLG asks for; nothing runs twice; the page shows the
    files' numbers, and its other tables stay."""
    common = [
        "--smoke",
        "--folder",
        str(tmp_path / "out"),
        "--tasks",
        "webnlg-texts",
        "--learners",
        PREFIX,
        FULL_TUNING,
    ]
    main(["generation", "--data", str(data), *common])
    made = sorted((tmp_path / "out").glob("*/webnlg-texts/*.json"))
    assert [path.name.split("-")[0] for path in made] == ["bare", *["full"] * 3, *["prefix_tuning"] * 3]
    results = [json.loads(path.read_text()) for path in made]
    assert all(set(result["shift"]) == {"webnlg-unseen"} for result in results)
    assert all(set(result["held_out"]["metrics"]) == {"bleu", "rouge_l"} for result in results)
    assert {result["rows"]["train"] for result in results} == {0, 4}
    run_again: list[str] = []
    monkeypatch.setattr(Laboratory, "_train", lambda self, cells: run_again.append("jobs"))
    monkeypatch.setattr(Laboratory, "_run_alone", lambda self, cell: run_again.append(cell.task) or {})
    main(["generation", "--data", str(data), *common])
    assert run_again == []
    page = tmp_path / "page.md"
    names = ("core", "generation_scores", "generation_gain", "generation_setting")
    page.write_text("".join(f"<!-- begin {name} -->\nold {name}\n<!-- end {name} -->\n" for name in names))
    main(["report", *common, "--page", str(page)])
    text = page.read_text()
    assert "old core" in text and "old generation" not in text
    line = next(line for line in text.splitlines() if line.startswith("| WebNLG, unseen categories | BLEU | 4 |"))
    bare = next(result for result in results if result["cell"]["learner"]["name"] == "bare")
    assert line.split(" | ")[3] == f"{bare['shift']['webnlg-unseen']['metrics']['bleu']:.1f}"
    assert (page.with_suffix("") / "generation.png").read_bytes().startswith(b"\x89PNG")
    assert len((page.with_suffix("") / "generation.jsonl").read_text().splitlines()) == 7 + 2


def test_gains_are_paired_and_of_the_chosen_rates(tmp_path: Path) -> None:
    """The second rate has the lower loss where rows select, and is taken, though it reports worse."""
    results = Results(tmp_path)
    asked = dataclasses.replace(
        Asked(dataclasses.replace(SMOKE, num_seeds=2)), sets=("e2e-texts",), learners=(PREFIX, FULL_TUNING)
    )
    second = [list(LEARNERS[label].values())[1] for label in asked.learners]

    while missing := [cell for _, cell in plan(asked, results) if results.get(cell) is None]:
        for cell in missing:
            is_second = cell.learner in second
            ahead = 3.0 + 2 * cell.seed if cell.learner.name == "prefix_tuning" else 0.0
            scores = {"bleu": (10.0 if is_second else 50.0) + ahead, "rouge_l": 0.5}
            results.put(cell, _made_up(1.0 if is_second else 2.0, scores))
    tables = tables_of(asked, results, {"model": "made up", "intervals": "", "machine": ""})
    scores, gain = (_line(tables[name], "| E2E | BLEU |") for name in ("scores", "gain"))
    assert scores[3:6] == ["50.0", "14.0 ± 12.7", "10.0 ± 0.0"]  # 13 and 15: 12.706 * 1.4142 / sqrt(2)
    assert gain[2:] == ["4", "4.0 ± 12.7"]
    assert _line(tables["scores"], "| E2E | loss |")[4:] == ["1.000 ± 0.000", "1.000 ± 0.000"]
    assert f"| {PREFIX} | 0.003 | **1.000** |" in tables["rates"]


def test_seen_and_unseen_rows_are_told_apart(tmp_path: Path) -> None:
    """Each line of WebNLG has the scores of its own rows."""
    results = Results(tmp_path)
    asked = dataclasses.replace(Asked(SMOKE), sets=("webnlg-texts",), learners=(PREFIX,))
    while missing := [cell for _, cell in plan(asked, results) if results.get(cell) is None]:
        for cell in missing:
            seen, unseen = ({"metrics": {"bleu": bleu, "rouge_l": 0.5}} for bleu in (20.0, 10.0))
            results.put(cell, {**_made_up(1.0, {}), "held_out": seen, "shift": {"webnlg-unseen": unseen}})
    table = tables_of(asked, results, {"model": "made up", "intervals": "", "machine": ""})["scores"]
    for rows, bleu in (("seen", "20.0"), ("unseen", "10.0")):
        assert _line(table, f"| WebNLG, {rows} categories | BLEU |")[3:] == [bleu, bleu]


def _line(table: str, start: str) -> Sequence[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(start))
    return line.strip("| ").split(" | ")


def _made_up(loss: float, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "curve": [[1, 9.0, 9.0, None], [2, loss, loss, None]],
        "best_step": 2,
        "stored_bytes": 4,
        "cpu_seconds": 1.0,
        "train_tokens": 1,
        "held_out": {"metrics": metrics},
        "rows": {"train": 4, "select": 4, "report": 4},
    }
