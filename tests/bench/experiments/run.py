"""Runs cells: all trainings of promptd's own methods on one task share passes, everything else runs one by one."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from promptd_store import PromptKind
from torch.nn.functional import normalize

from promptd.llm import LLM
from promptd.training import (
    METHODS,
    Encoded,
    Example,
    MethodConfig,
    Objective,
    ResidualConfig,
    TaskFormat,
    TrainingConfig,
    TrainingResult,
    build_method,
    encode_examples,
    make_artifact,
    method_from_sidecar,
    objective_for,
)
from promptd.training.data import render, shuffled
from tests.bench.experiments.ablations import registered
from tests.bench.experiments.cells import Cell, ContextConfig, Results
from tests.bench.experiments.descent import Descent
from tests.bench.experiments.infix import InfixConfig, tune_infix
from tests.bench.experiments.jobs import Account, WatchedJob, run_jobs
from tests.bench.experiments.plain import plain_of
from tests.bench.experiments.readers import PromptReader, Reader, TallyReader, WeightReader, examined
from tests.bench.experiments.sets import SETS, SetRows, TaskSet, load_rows
from tests.bench.experiments.superglue_sets import SEPARATOR, SUPERGLUE, load_halves
from tests.bench.experiments.task_scores import constant_score, scored
from tests.bench.experiments.text_sets import TEXT_SETS, load_published
from tests.bench.experiments.weights import WeightConfig, tune_weights

BYTES_PER_NUMBER = 4
KNOWN = {**SETS, **SUPERGLUE, **TEXT_SETS}
NUM_USERS = 3
MAX_JOBS = 12
"""Trainings that share passes: a pass is full with fewer, and what is interrupted is run again."""
ROOM = 100
"""Virtual tokens that must fit in front of held-out rows, whatever the learner has: all read the same rows."""


class Laboratory:
    """One base model, one folder of data sets, one folder of results."""

    def __init__(self, folder: Path, data: Path, results: Results, llm: LLM) -> None:
        self._folder, self._data, self._results = folder, data, results
        self._llm, self._model = llm, llm.model

    def run(self, cells: Iterable[Cell], until: float | None = None) -> bool:
        """Run what has no result yet, task by task; False where `until` (of `time.monotonic`) came first."""
        missing = {cell.file_name: cell for cell in cells if self._results.get(cell) is None}.values()
        jobs = [cell for cell in missing if isinstance(cell.learner, MethodConfig)]
        parts = [
            own[start : start + MAX_JOBS]
            for _, group in itertools.groupby(jobs, key=lambda cell: (cell.task, cell.num_train))
            for own in [list(group)]
            for start in range(0, len(own), MAX_JOBS)
        ]
        for part in [*parts, *([cell] for cell in missing if cell not in jobs)]:
            if until is not None and time.monotonic() > until:
                return False
            began = time.monotonic()
            if part[0] in jobs:
                self._train(part)
            else:
                self._results.put(part[0], self._run_alone(part[0]))
            what = f"{len(part)} jobs" if part[0] in jobs else f"{part[0].learner.name}, seed {part[0].seed}"
            print(f"    {part[0].task}: {what}, {time.monotonic() - began:.0f} s", flush=True)
        return True

    def _rows(self, cell: Cell) -> SetRows:
        chosen = KNOWN[cell.task]
        counts = {
            "num_train": cell.num_train, "num_validation": cell.num_validation, "num_held_out": cell.num_held_out,
        }  # fmt: skip
        if chosen.halves:
            return load_halves(chosen, self._data, cell.seed, **counts)
        if chosen.selects_from:
            return load_published(chosen, self._data, cell.seed, **counts)
        return load_rows(chosen, self._data, cell.seed, **counts, num_per_label=cell.num_per_label)

    def _format(self, chosen: TaskSet) -> TaskFormat:
        """The tokenizer's own separator stands where a template names one."""
        found, own = chosen.format, self._model.tokenizer.sep_token
        if own is None or SEPARATOR not in (found.template or ""):
            return found
        return dataclasses.replace(found, template=(found.template or "").replace(SEPARATOR, own))

    def _objective(self, cell: Cell) -> Objective:
        is_method = isinstance(cell.learner, MethodConfig)
        kind = METHODS[cell.learner.name].kind if is_method else PromptKind.SOFT
        return objective_for(self._model, self._format(KNOWN[cell.task]), kind)

    def _encoded(self, chosen: TaskSet, rows: Sequence[Example]) -> list[Encoded]:
        return encode_examples(self._model, self._format(chosen), rows, ROOM)

    # ------------------------------------------------------------------------------------- promptd's own methods

    def _train(self, cells: Sequence[Cell]) -> None:
        named = {cell.file_name: cell for cell in cells}
        with registered():
            jobs = {name: self._job(cell) for name, cell in named.items()}

            def ended(name: str, outcome: TrainingResult | Exception, account: Account) -> None:
                cell = named[name]
                if isinstance(outcome, Exception):
                    print(f"    {name}: {outcome}", file=sys.stderr)
                    self._results.put(cell, {"error": str(outcome)})
                else:
                    self._results.put(cell, self._trained(cell, outcome, account))

            run_jobs(self._model, jobs, ended)

    def _job(self, cell: Cell) -> WatchedJob:
        if not isinstance(cell.learner, MethodConfig):
            raise TypeError(f"{cell.learner} is no method of jobs")
        rows, chosen = self._rows(cell), KNOWN[cell.task]
        return WatchedJob(
            self._model, training_of(cell, cell.learner), self._format(chosen), rows.train, rows.validation,
            selects_on_all=chosen.is_published,
        )  # fmt: skip

    def _trained(self, cell: Cell, result: TrainingResult, account: Account) -> dict[str, Any]:
        chosen = KNOWN[cell.task]
        artifact = make_artifact(self._model, self._format(chosen), result)
        found = {
            **_learned(account.curve, result.best_step, account.train_tokens, account.cpu_seconds),
            "trained_params": result.trainable_params,
            "stored_params": result.stored_params,
            "stored_bytes": result.stored_params * BYTES_PER_NUMBER,
            **self._held_out(cell, PromptReader(self._llm, result.prompt, artifact)),
        }
        config = result.config.method
        if isinstance(config, ResidualConfig) and config.name == "residual" and not chosen.is_published:
            found["branch_share"] = self._branch_shares(result, chosen)
        if config.init == "class_labels":
            found["labels_kept"] = self._labels_kept(result.prompt, chosen)
        return found

    @torch.no_grad()
    def _branch_shares(self, result: TrainingResult, chosen: TaskSet) -> dict[str, list[float]]:
        """Return |phi(P)| / |P| of every virtual token, at the start and at the best step."""
        config = result.config
        first = build_method(config.method, self._model, seed=config.seed, label_words=chosen.task.label_words)
        best = method_from_sidecar(result.sidecar, config.method, self._model)
        shares = {}
        for name, method in (("start", first), ("best", best)):
            prompt = dict(method.named_parameters())["prompt"]
            ratio = (method.fold() - prompt).norm(dim=1) / prompt.norm(dim=1)
            shares[name] = [round(value, 4) for value in ratio.tolist()]
        return shares

    @torch.no_grad()
    def _labels_kept(self, prompt: torch.Tensor, chosen: TaskSet) -> float:
        """Return the share of label slots whose nearest row of the vocabulary, by cosine, is still their label's."""
        words = [
            self._model.encode(word, add_special_tokens=False) for word in (chosen.task.label_words or {}).values()
        ]
        words = words[: len(prompt)]
        table = self._model.embed(torch.arange(self._model.spec.vocab_size)).float()
        nearest = (normalize(prompt) @ normalize(table).T).argmax(1).tolist()
        return sum(nearest[slot] in word for slot, word in enumerate(words)) / len(words)

    # ------------------------------------------------------------------------------------------ everything else

    def _run_alone(self, cell: Cell) -> dict[str, Any]:
        if isinstance(cell.learner, ContextConfig):
            return self._in_context(cell, cell.learner)
        chosen, rows = KNOWN[cell.task], self._rows(cell)
        objective = self._objective(cell)
        train = self._encoded(chosen, rows.train)
        # The same rows as a job: it selects on every second one of a shuffled order, or on all.
        selection = self._encoded(chosen, shuffled(rows.validation, cell.seed))[:: 1 if chosen.is_published else 2]
        training = training_of(cell, None)
        reader: Reader
        descent: Descent[Any]
        if isinstance(cell.learner, WeightConfig):
            plain = plain_of(self._model, self._folder, num_classes=objective.num_classes, seed=cell.seed)
            tuning, descent = tune_weights(plain, cell.learner, training, objective, train, selection)
            reader = WeightReader(tuning, self._model)
            trained = stored = tuning.trained_params
        elif isinstance(cell.learner, InfixConfig):
            own = cell.learner
            method, tally, descent = tune_infix(self._model, self._folder, own, training, objective, train, selection)
            reader, trained, stored = TallyReader(tally), method.trainable_params, method.stored_params
        else:
            raise TypeError(f"{cell.learner} is trained by jobs")
        return {
            **_learned(descent.curve, descent.best_step, descent.train_tokens, descent.cpu_seconds),
            "trained_params": trained,
            "stored_params": stored,
            "stored_bytes": stored * BYTES_PER_NUMBER,
            **self._held_out(cell, reader),
        }

    def _in_context(self, cell: Cell, config: ContextConfig) -> dict[str, Any]:
        chosen = KNOWN[cell.task]
        lead = ""
        if config.kind == "instruction":
            lead = chosen.instruction
        elif config.kind == "examples":
            lead = "".join(self._shown(chosen, example) for example in self._shots(cell, chosen))
        ids = tuple(self._model.encode(lead)) if lead else ()
        return {
            "context_tokens": len(ids),
            "stored_bytes": len(lead.encode()),
            **self._held_out(cell, PromptReader(self._llm, None, lead=ids)),
        }

    def _shots(self, cell: Cell, chosen: TaskSet) -> list[Example]:
        rows = list(self._rows(cell).train)
        words = chosen.task.label_words
        if not words:
            return rows[: chosen.num_shots]
        each = max(1, chosen.num_shots // len(words))
        shots = [example for label in words for example in [row for row in rows if row.label == label][:each]]
        random.Random(cell.seed).shuffle(shots)
        return shots

    def _shown(self, chosen: TaskSet, example: Example) -> str:
        text = render(chosen.task.template, example)
        if example.label is not None:
            return f"{text}{(chosen.task.label_words or {})[example.label]}.\n"
        return text + (example.completion or "").rstrip("\n") + "\n"

    # -------------------------------------------------------------------------------------------------- held-out

    def _held_out(self, cell: Cell, reader: Reader) -> dict[str, Any]:
        chosen = KNOWN[cell.task]
        objective = self._objective(cell)
        rows = self._rows(cell)
        held_out = rows.held_out
        found: dict[str, Any]
        if chosen.is_published:
            own = scored(chosen.task, reader, objective, partial(self._encoded, chosen), held_out)
            used = {"train": len(rows.train), "select": len(rows.validation), "report": len(held_out)}
            found = {"held_out": own, "constant": constant_score(chosen.task, held_out), "rows": used}
            return {**found, "shift": self._elsewhere(cell, reader, objective)} if chosen.shifts else found
        encoded = self._encoded(chosen, held_out)
        found = {"held_out": examined(reader, objective, encoded, generates=cell.task == "e2e")}
        if chosen.task.has_labels:
            labels = [example.label for example in held_out]
            found["majority"] = round(max(labels.count(label) for label in set(labels)) / len(labels), 4)
        shift = {}
        for name in chosen.shifts:
            elsewhere = load_rows(
                SETS[name], self._data, cell.seed, num_train=0, num_validation=0, num_held_out=cell.num_held_out
            )
            shift[name] = examined(reader, objective, self._encoded(SETS[name], elsewhere.held_out), generates=False)
        if chosen.by_user:
            other = load_rows(
                chosen, self._data, (cell.seed + 1) % NUM_USERS, num_train=0, num_validation=0,
                num_held_out=cell.num_held_out,
            )  # fmt: skip
            shift["next_user"] = examined(reader, objective, self._encoded(chosen, other.held_out), generates=False)
        if shift:
            found["shift"] = shift
        return found

    def _elsewhere(self, cell: Cell, reader: Reader, objective: Objective) -> dict[str, Any]:
        """Score what is written of other rows, for which nothing was trained or selected."""
        found = {}
        for name in KNOWN[cell.task].shifts:
            other = KNOWN[name]
            rows = load_published(
                other, self._data, cell.seed, num_train=0, num_validation=0, num_held_out=cell.num_held_out
            )
            encode = partial(self._encoded, other)
            found[name] = scored(other.task, reader, objective, encode, rows.held_out)
        return found


def training_of(cell: Cell, method: MethodConfig | None) -> TrainingConfig:
    """Return the settings that all learners of a cell have in common."""
    common: dict[str, Any] = {} if method is None else {"method": method}
    return TrainingConfig(
        **common, num_steps=cell.num_steps, batch_size=cell.batch_size, num_evaluations=cell.num_evaluations,
        schedule=cell.schedule, seed=cell.seed, patience=cell.patience,
    )  # fmt: skip


def _learned(curve: Sequence[Any], best_step: int, train_tokens: int, cpu_seconds: float) -> dict[str, Any]:
    return {
        "curve": [[step, *(None if value is None else round(value, 5) for value in rest)] for step, *rest in curve],
        "best_step": best_step,
        "train_tokens": train_tokens,
        "cpu_seconds": round(cpu_seconds, 2),
    }
