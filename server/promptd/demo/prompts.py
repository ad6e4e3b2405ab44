"""Train the demo's prompts on a base model and measure them on held-out rows.

    python -m promptd.demo.prompts --model DIR --data DIR --out DIR [--only NAME] [--budget-seconds S]

For each recipe, `OUT` gets `NAME.safetensors` (the artifact that is served), `NAME.sidecar.safetensors` (the parameters
before folding) and `NAME.json` (where it comes from and what it reached, beside the bare model and the majority class).
A prompt whose card names this model and this recipe is not trained again. Held-out slices go to `--slices`.
"""
# ruff: noqa: T201 (a command that reports on the terminal)

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from promptd_store import PromptArtifact, decode

from promptd.demo.recipes import RECIPES, Recipe
from promptd.demo.task_data import load_task, write_slice
from promptd.engine.request import SamplingParams
from promptd.evaluation.metrics import bleu
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from promptd.training import (
    Encoded,
    Example,
    Progress,
    TrainingJob,
    Watcher,
    encode_examples,
    evaluate,
    majority_share,
    make_artifact,
    method_json,
    objective_for,
    provenance,
    train,
)

NUM_SAMPLES = 3


def main() -> None:
    """Parse the command line, train what is missing, then compare the users of one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slices", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES])
    parser.add_argument("--budget-seconds", type=float)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [recipe for recipe in RECIPES if args.only in (None, recipe.name)]
    run(load_model(args.model), chosen, args.data, args.out, args.slices, args.budget_seconds)


def run(
    model: FrozenModel,
    recipes: Sequence[Recipe],
    data: Path,
    out: Path,
    slices: Path,
    budget_seconds: float | None = None,
) -> None:
    """Train the prompts that `out` lacks within the budget, then compare the users of one task."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [recipe for recipe in recipes if not _is_done(model, recipe, out)]
    total = sum(recipe.weight for recipe in missing)
    for recipe in missing:
        share = None if budget_seconds is None else budget_seconds * recipe.weight / total
        make_prompt(model, recipe, data, out, slices, share)
    for recipe in recipes:
        compare_users(model, recipe, data, out)


def make_prompt(
    model: FrozenModel, recipe: Recipe, data: Path, out: Path, slices: Path, max_seconds: float | None
) -> None:
    """Train one recipe, measure it, write artifact, sidecar, card and slice; the card last."""
    print(f"{recipe.name}: {recipe.title}", flush=True)
    task = load_task(recipe, data)
    config = dataclasses.replace(recipe.training, max_seconds=max_seconds)
    job = TrainingJob(model, config, recipe.task, task.train, task.validation)
    result = train(model, {recipe.name: job}, {recipe.name: Watcher(_print_progress)})[recipe.name]
    sampling = {"temperature": 0.0, "max_tokens": recipe.max_tokens}
    artifact = make_artifact(model, recipe.task, result, default_sampling=sampling, stop=recipe.stop)
    decode(artifact.content, model.spec)
    card = {
        "name": recipe.name,
        "title": recipe.title,
        "dataset": recipe.dataset,
        "attribution": recipe.attribution,
        "recipe_digest": recipe_digest(recipe),
        "version": artifact.version,
        "base_fingerprint": model.spec.fingerprint,
        "kind": str(artifact.kind),
        "num_virtual_tokens": artifact.num_virtual_tokens,
        "template": recipe.task.template,
        "label_words": recipe.task.label_words,
        "provenance": provenance(result),
        "held_out": {
            "shipped_slice": _measure(model, recipe, artifact, result.prompt, task.shipped, generate=True),
            "test": _measure(model, recipe, artifact, result.prompt, task.test, generate=False),
        },
        "samples": _samples(model, artifact, task.shipped, recipe.max_tokens),
    }
    write_slice(recipe, task.shipped, slices)
    (out / f"{recipe.name}.safetensors").write_bytes(artifact.content)
    (out / f"{recipe.name}.sidecar.safetensors").write_bytes(result.sidecar)
    _write_card(out, card)
    print(f"  {json.dumps(card['held_out'])}", flush=True)


def compare_users(model: FrozenModel, recipe: Recipe, data: Path, out: Path) -> None:
    """Score the other user's prompt on this user's held-out rows: a style that is learned fits its own user better."""
    own, rival = out / f"{recipe.name}.json", out / f"{recipe.rival}.safetensors"
    if recipe.rival is None or not own.exists() or not rival.exists():
        return
    artifact = decode(rival.read_bytes(), model.spec)
    rows = _encoded(model, recipe, artifact, load_task(recipe, data).test)
    prompt = next(iter(artifact.tensors.values()))
    card = json.loads(own.read_text(encoding="utf-8"))
    scores = evaluate(model, prompt, rows, objective_for(model, recipe.task))
    card["held_out"]["test"]["rival_prompt"] = {"name": recipe.rival, **scores.to_json()}
    _write_card(out, card)


def recipe_digest(recipe: Recipe) -> str:
    """Return `sha256:…` of everything in a recipe that shapes the prompt."""
    training = {**dataclasses.asdict(recipe.training), "method": method_json(recipe.training.method)}
    shaping = [recipe.dataset, recipe.splits, dataclasses.asdict(recipe.task), training]
    return "sha256:" + hashlib.sha256(json.dumps([*shaping, recipe.max_tokens, *recipe.stop]).encode()).hexdigest()


def _is_done(model: FrozenModel, recipe: Recipe, out: Path) -> bool:
    path = out / f"{recipe.name}.json"
    if not path.exists():
        return False
    card = json.loads(path.read_text(encoding="utf-8"))
    wanted = (model.spec.fingerprint, recipe_digest(recipe))
    return (card.get("base_fingerprint"), card.get("recipe_digest")) == wanted


def _measure(
    model: FrozenModel,
    recipe: Recipe,
    artifact: PromptArtifact,
    prompt: torch.Tensor,
    examples: Sequence[Example],
    *,
    generate: bool,
) -> dict[str, Any]:
    """Return the prompt's and the bare model's scores on rows, and the majority class where there are labels."""
    objective = objective_for(model, recipe.task)
    rows = _encoded(model, recipe, artifact, examples)
    measured: dict[str, Any] = {
        "prompt": evaluate(model, prompt, rows, objective).to_json(),
        "bare_model": evaluate(model, None, rows, objective).to_json(),
    }
    if objective.has_labels:
        label, share = majority_share([example.label or "" for example in examples])
        measured["majority"] = {"label": label, "accuracy": round(share, 4)}
    elif generate:
        measured["prompt"]["bleu"] = _bleu(model, artifact, examples, recipe, with_prompt=True)
        measured["bare_model"]["bleu"] = _bleu(model, artifact, examples, recipe, with_prompt=False)
    return measured


def _encoded(
    model: FrozenModel, recipe: Recipe, artifact: PromptArtifact, examples: Sequence[Example]
) -> list[Encoded]:
    return encode_examples(model, recipe.task, examples, artifact.num_virtual_tokens)


def _bleu(
    model: FrozenModel, artifact: PromptArtifact, examples: Sequence[Example], recipe: Recipe, *, with_prompt: bool
) -> float:
    """Return corpus BLEU of greedy answers against all references of each input."""
    references: dict[str, list[str]] = {}
    for example in examples:
        references.setdefault(example.fields["text"], []).append((example.completion or "").strip())
    answers = _answers(model, artifact, list(references), recipe.max_tokens, with_prompt=with_prompt)
    return round(bleu([answer.strip() for answer in answers], list(references.values())), 2)


def _answers(
    model: FrozenModel, artifact: PromptArtifact, texts: Sequence[str], max_tokens: int, *, with_prompt: bool
) -> list[str]:
    """Return greedy continuations by the serving engine; the bare model gets the same rendered text."""
    template = artifact.manifest.template or "{text}"
    rendered = [template.replace("{text}", text) for text in texts]
    prompts = [artifact] * len(texts) if with_prompt else [None] * len(texts)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=("\n",))
    inputs = list(texts) if with_prompt else rendered
    return [completion.text for completion in LLM(model).generate(inputs, prompts, params)]


def _samples(
    model: FrozenModel, artifact: PromptArtifact, examples: Sequence[Example], max_tokens: int
) -> list[dict[str, str]]:
    texts = list(dict.fromkeys(example.fields["text"] for example in examples))[:NUM_SAMPLES]
    ours = _answers(model, artifact, texts, max_tokens, with_prompt=True)
    bare = _answers(model, artifact, texts, max_tokens, with_prompt=False)
    keys = ("input", "with_prompt", "bare_model")
    return [dict(zip(keys, answers, strict=True)) for answers in zip(texts, ours, bare, strict=True)]


def _print_progress(progress: Progress) -> None:
    if progress.scores is not None:
        accuracy = "" if progress.scores.accuracy is None else f"  accuracy {progress.scores.accuracy:.3f}"
        print(
            f"  step {progress.step:4d}  {progress.seconds:5.0f} s  loss {progress.loss:.3f}  "
            f"validation {progress.scores.loss:.3f}{accuracy}",
            flush=True,
        )


def _write_card(out: Path, card: dict[str, Any]) -> None:
    path = out / f"{card['name']}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
