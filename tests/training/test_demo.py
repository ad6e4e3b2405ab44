"""The demo's recipe end to end on a tiny model: artifact, sidecar, card and slice; nothing is trained twice."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from promptd_store import PromptKind, decode

from promptd.demo.prompts import run
from promptd.demo.recipes import RECIPES, Recipe
from promptd.demo.task_data import load_task, write_slice
from promptd.llm import LLM
from promptd.modeling import FrozenModel
from promptd.training import METHODS, ResidualConfig, TrainingConfig, method_from_sidecar, read_examples

TINY = TrainingConfig(ResidualConfig(3), num_steps=2, batch_size=4, num_evaluations=1)


def tiny(name: str) -> Recipe:
    """A recipe of the demo with a training of two steps."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    return dataclasses.replace(recipe, training=TINY, max_tokens=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up rows in the layout of the data sets."""
    intents = ["GetWeather", "PlayMusic", "RateBook"]
    commands = [{"text": f"command {n}", "label": intents[n % 3], "slots": []} for n in range(400)]
    users = ["to_american_standard", "to_basic_english"]
    verses = [{"input": f"verse {n // 4}", "target": f"the verse {n}", "user": users[n % 2]} for n in range(80)]
    for folder, split, rows in (
        ("snips", "train", commands),
        ("snips", "validation", commands[:30]),
        ("bible_style", "train", verses),
        ("bible_style", "validation", verses[:8]),
        ("bible_style", "test", verses[8:40]),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines))
    return tmp_path


def test_a_prompt_and_everything_about_it(llama: FrozenModel, data: Path, tmp_path: Path) -> None:
    """The card's held-out accuracy is what the serving engine reaches on the shipped slice, read back from disk."""
    out, slices, recipe = tmp_path / "out", tmp_path / "slices", tiny("snips-intent")
    run(llama, [recipe], data, out, slices)
    artifact = decode((out / "snips-intent.safetensors").read_bytes(), llama.spec)
    card = json.loads((out / "snips-intent.json").read_text())
    assert card["version"] == artifact.version and card["base_fingerprint"] == llama.spec.fingerprint
    sidecar = (out / "snips-intent.sidecar.safetensors").read_bytes()
    folded = method_from_sidecar(sidecar, TINY.method, llama).fold()
    assert torch.equal(folded, artifact.tensors["prompt_embeddings"])
    rows = read_examples(slices / "snips-intent.jsonl")
    words = artifact.manifest.label_words or {}
    scores = LLM(llama).score([row.fields["text"] for row in rows], list(words.values()), [artifact] * len(rows))
    right = [list(words)[row.index(max(row))] == example.label for row, example in zip(scores, rows, strict=True)]
    measured = card["held_out"]["shipped_slice"]
    assert measured["prompt"]["accuracy"] == pytest.approx(sum(right) / len(rows), abs=1e-4)
    assert measured["majority"]["accuracy"] == pytest.approx(1 / 3, abs=0.01)
    assert measured["bare_model"]["num_rows"] == len(rows) == 30
    assert "CC0" in (slices / "ATTRIBUTION.md").read_text()


def test_only_what_is_missing_is_trained(llama: FrozenModel, data: Path, tmp_path: Path) -> None:
    """A finished prompt is left alone; a changed recipe or a missing card trains it anew."""
    out, recipe = tmp_path / "out", tiny("snips-intent")
    run(llama, [recipe], data, out, tmp_path / "slices")
    path = out / "snips-intent.safetensors"
    first = path.stat().st_mtime_ns
    run(llama, [recipe], data, out, tmp_path / "slices")
    assert path.stat().st_mtime_ns == first
    changed = dataclasses.replace(recipe, training=dataclasses.replace(TINY, seed=5))
    run(llama, [changed], data, out, tmp_path / "slices")
    assert path.stat().st_mtime_ns > first


def test_users_of_one_task_are_compared(llama: FrozenModel, data: Path, tmp_path: Path) -> None:
    """Each user's card holds the other user's prompt's loss on its own held-out rows; answers are measured in BLEU."""
    out = tmp_path / "out"
    recipes = [tiny("bible-american-standard"), tiny("bible-basic-english")]
    run(llama, recipes, data, out, tmp_path / "slices", budget_seconds=60)
    for recipe in recipes:
        held_out = json.loads((out / f"{recipe.name}.json").read_text())["held_out"]
        assert held_out["test"]["rival_prompt"]["name"] == recipe.rival
        assert held_out["test"]["rival_prompt"]["loss"] > 0
        assert 0 <= held_out["shipped_slice"]["prompt"]["bleu"] <= 100


def test_slices_hold_whole_inputs_of_the_held_out_rows(data: Path, tmp_path: Path) -> None:
    """A shipped input comes with all of its references, none of which is a training row."""
    recipe = tiny("bible-american-standard")
    task = load_task(recipe, data)
    write_slice(recipe, task.shipped, tmp_path / "slices")
    shipped = read_examples(tmp_path / "slices" / f"{recipe.name}.jsonl")
    assert [dict(row.fields) for row in shipped] == [dict(row.fields) for row in task.shipped]
    count = {text: sum(row.fields["text"] == text for row in task.test) for text in {r.fields["text"] for r in shipped}}
    assert all(sum(row.fields["text"] == text for row in shipped) == number for text, number in count.items())


def test_recipes_are_sound() -> None:
    """At least six prompts: two with label words, one prefix, two users of one task; names are distinct."""
    names = [recipe.name for recipe in RECIPES]
    assert len(set(names)) == len(names) >= 6
    assert sum(recipe.task.label_words is not None for recipe in RECIPES) >= 2
    assert any(METHODS[recipe.training.method.name].kind == PromptKind.PREFIX for recipe in RECIPES)
    users = [recipe for recipe in RECIPES if recipe.rival]
    assert len(users) >= 2 and all(recipe.rival in names for recipe in users)
    for recipe in RECIPES:
        assert "CC" in recipe.attribution or "public-domain" in recipe.attribution
        words = list((recipe.task.label_words or {}).values())
        assert len(set(words)) == len(words)
