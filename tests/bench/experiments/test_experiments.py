"""The experiments' harness: every kind of learner runs, nothing runs twice, tables show what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_PATH
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from promptd.training import METHODS, Encoded, Scores, build_method, encode_examples, objective_for
from tests.bench.experiments.__main__ import main
from tests.bench.experiments.ablations import registered
from tests.bench.experiments.descent import measure
from tests.bench.experiments.infix import Infix
from tests.bench.experiments.plain import plain_of
from tests.bench.experiments.plans import MLP, PROMPTS, PT, RPT, SMOKE, core
from tests.bench.experiments.readers import PromptReader
from tests.bench.experiments.run import Laboratory
from tests.bench.experiments.sets import SETS, load_rows
from tests.bench.experiments.stats import Interval, steps_to
from tests.bench.experiments.weights import WeightConfig, WeightTuning

PAGE = "# Page\n\nKept.\n\n<!-- begin core -->\nold\n<!-- end core -->\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own rows as a published set with two files."""
    folder = tmp_path_factory.mktemp("data")
    lines = (DEMO_DATA_PATH / "snips-intent.jsonl").read_text().splitlines(keepends=True)
    (folder / "snips").mkdir()
    (folder / "snips" / "train.jsonl").write_text("".join(lines[:60]))
    (folder / "snips" / "validation.jsonl").write_text("".join(lines[60:80]))
    return folder


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    """The embedded model."""
    return load_model(DEMO_MODEL_PATH)


def test_a_smoke_run_fills_the_page_and_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten learners give a file each, a second call runs only what is missing, the page shows the files' numbers."""
    arguments = ["core", "--smoke", "--tasks", "snips", "--data", str(data), "--folder", str(tmp_path / "out")]
    main(arguments)
    (snips,) = (tmp_path / "out").glob("*/snips")
    wanted = {cell.file_name.split("/")[1]: label for label, cell in core(SMOKE) if cell.task == "snips"}
    assert {path.name for path in snips.iterdir()} == set(wanted)
    results = {wanted[path.name]: json.loads(path.read_text()) for path in snips.iterdir()}
    assert all(0 <= result["held_out"]["accuracy"] <= 1 for result in results.values())
    assert len({result["held_out"]["loss"] for result in results.values()}) == len(results)
    assert [point[0] for point in results[PT]["curve"]] == [1, 2]
    assert results[PT]["stored_bytes"] == 10 * 256 * 4
    assert results[RPT]["branch_share"]["start"] != results[RPT]["branch_share"]["best"]

    run_again: list[str] = []
    train, alone = Laboratory._train, Laboratory._run_alone
    monkeypatch.setattr(Laboratory, "_train", lambda self, cells: [run_again.append(c.learner.name) for c in cells])
    monkeypatch.setattr(Laboratory, "_run_alone", lambda self, cell: run_again.append(cell.learner.name) or {})
    main(arguments)
    assert run_again == []
    next(snips.glob("prompt_tuning-*")).unlink()
    main(arguments)
    assert run_again == ["prompt_tuning"]
    monkeypatch.setattr(Laboratory, "_train", train)
    monkeypatch.setattr(Laboratory, "_run_alone", alone)
    main(arguments)

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    main(["report", "--smoke", "--folder", str(tmp_path / "out"), "--page", str(page)])
    text = page.read_text()
    assert "Kept." in text
    assert "old" not in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {PT} |"))
    assert line.split(" | ")[1] == f"{100 * results[PT]['held_out']['accuracy']:.1f}"
    lines = (page.with_suffix("") / "results.jsonl").read_text().splitlines()
    assert len(lines) >= len(results)
    assert (page.with_suffix("") / "costs.png").read_bytes().startswith(b"\x89PNG")


def _rows(model: FrozenModel, data: Path) -> list[Encoded]:
    chosen = SETS["snips"]
    rows = load_rows(chosen, data, 0, num_train=0, num_validation=0, num_held_out=9)
    return encode_examples(model, chosen.format, rows.held_out, 10)


def test_all_readers_measure_alike(model: FrozenModel, data: Path) -> None:
    """The bare model scores the same through promptd's passes and through the peers' padded batches."""
    rows = _rows(model, data)
    objective = objective_for(model, SETS["snips"].format)
    ours = PromptReader(LLM(model), None).scores(objective, rows)
    tuning = WeightTuning(plain_of(model, DEMO_MODEL_PATH), WeightConfig("full", 1e-3), seed=0)
    theirs = measure(objective, rows, lambda part: tuning.tally(objective, part))
    assert Scores.of(theirs, has_labels=True).loss == pytest.approx(ours.loss, abs=1e-4)
    for kind in ("lora", "ia3"):  # adapters begin as the bare model
        adapted = WeightTuning(plain_of(model, DEMO_MODEL_PATH), WeightConfig(kind, 1e-3), seed=0)
        begun = measure(objective, rows, lambda part, adapted=adapted: adapted.tally(objective, part))
        assert Scores.of(begun, has_labels=True).loss == pytest.approx(ours.loss, abs=1e-4)
    with torch.no_grad():
        tuning.trained[0].mul_(1.1)
    changed = measure(objective, rows, lambda part: tuning.tally(objective, part))
    assert Scores.of(changed, has_labels=True).loss != pytest.approx(ours.loss, abs=1e-3)


def test_a_text_in_front_is_that_text(model: FrozenModel, data: Path) -> None:
    """A lead that runs once for all rows scores them as rows that begin with it."""
    rows, lead = _rows(model, data), tuple(model.encode("play play play music music music "))
    objective = objective_for(model, SETS["snips"].format)
    written = [dataclasses.replace(row, text_ids=lead + row.text_ids) for row in rows]
    llm = LLM(model)
    expected = PromptReader(llm, None).scores(objective, written)
    assert PromptReader(llm, None, lead=lead).scores(objective, rows).loss == pytest.approx(expected.loss, abs=1e-4)
    assert PromptReader(llm, None).scores(objective, rows).loss != pytest.approx(expected.loss, abs=1e-3)


def test_an_infix_of_no_tokens_is_the_bare_model(model: FrozenModel) -> None:
    """The rows around an infix are read as ever, whatever their lengths; an infix changes them."""
    rows = [
        Encoded(tuple(model.encode(text)), tuple(model.encode(target)), None)  # type: ignore[arg-type]
        for text, target in (("name[The Vaults], eatType[pub]\n", "The Vaults is a pub."), ("A\n", "No"))
    ]
    objective = objective_for(model, SETS["e2e"].format)
    expected = PromptReader(LLM(model), None).scores(objective, rows).loss
    spec, infix = model.spec, Infix(DEMO_MODEL_PATH)
    with torch.no_grad():
        for count, equal in ((0, True), (2, False)):
            keys_values = torch.ones(spec.num_layers, 2, spec.num_kv_heads, count, spec.head_dim)
            tally = infix.tally(rows, keys_values)
            assert (abs(tally.nll / tally.num_target_tokens - expected) < 1e-4) is equal


def test_the_ablation_is_the_branch_without_the_skip(model: FrozenModel) -> None:
    """`mlp` is residual prompt tuning less the prompt, and no job can name it outside an experiment."""
    with registered():
        residual, mlp = (build_method(PROMPTS[label], model, seed=3) for label in (RPT, MLP))
        assert "mlp" in METHODS
    prompt = dict(residual.named_parameters())["prompt"]
    torch.testing.assert_close(mlp.fold(), residual.fold() - prompt.detach(), atol=1e-6, rtol=0)
    assert not {"mlp", "lstm", "embedding_prefix"} & set(METHODS)


def test_intervals_and_steps() -> None:
    """Student's t over three seeds; the first measured step at or below a loss."""
    each = Interval.of([1.0, 2.0, 3.0])
    assert (each.mean, each.half) == (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-3))
    assert (each.sign, Interval.of([1.0, 1.1, 1.2]).sign, Interval.of([5.0]).sign) == (0, 1, 0)
    curve = {"curve": [[10, 0.9], [20, 0.5], [30, 0.6]]}
    assert [steps_to(curve, goal) for goal in (1.0, 0.5, 0.4)] == [10, 20, None]
