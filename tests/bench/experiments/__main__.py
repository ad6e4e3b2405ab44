"""`python -m tests.bench.experiments [experiment ...] --data DIR`: behaviours of the papers on the embedded model.

Results are one JSON file a cell (a training on a task with a seed) below `--folder`, and what is there is not run
again: an interrupted run goes on where it stopped. `report` reads them and writes tables and plots; it runs nothing.
"""

from __future__ import annotations

import argparse
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

from promptd.demo import DEMO_MODEL_PATH
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from tests.bench.experiments import generation
from tests.bench.experiments.cells import Results
from tests.bench.experiments.choice import run_lines
from tests.bench.experiments.plans import EXPERIMENTS, FULL, SMOKE, WEIGHT_STEPS_DIVISOR, Scale, plan
from tests.bench.experiments.report import report
from tests.bench.experiments.run import Laboratory
from tests.bench.experiments.sets import SETS
from tests.bench.experiments.superglue import LEARNERS, Asked, run_all
from tests.bench.experiments.superglue import NAME as SUPERGLUE
from tests.bench.experiments.superglue_sets import TITLES

ALL = (*EXPERIMENTS, SUPERGLUE, generation.NAME)
DEFAULT_FOLDER = Path("build/experiments")  # ignored by git


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named experiments, or the core table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.experiments", description=__doc__)
    known = ", ".join([*ALL, "all", "report"])
    parser.add_argument("names", nargs="*", default=["core"], metavar="experiment", help=f"{known}; default: core")
    parser.add_argument("--data", type=Path, help="folder of data sets, one folder a set")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_PATH, help="default: the embedded model")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="results go here")
    parser.add_argument("--page", type=Path, help="report: fill this page's tables, and put plots beside it")
    parser.add_argument("--minutes", type=float, help="start nothing new after so long")
    parser.add_argument("--tasks", nargs="+", help="these tasks alone")
    parser.add_argument("--learners", nargs="+", metavar="LEARNER", help="superglue, generation: these alone")
    parser.add_argument("--sizes", nargs="+", type=int, help="generation: these numbers of training rows alone; 0: all")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default 1")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: proves that it runs, scores mean nothing")
    options = parser.parse_args(arguments)
    names = [*ALL] if "all" in options.names else options.names
    unknown = set(names) - {*ALL, "report"}
    if unknown:
        parser.error(f"unknown experiment {min(unknown)!r}; there are {known}")
    if unknown := set(options.learners or ()) - {*LEARNERS, *generation.LEARNERS}:
        parser.error(f"unknown learner {min(unknown)!r}; there are {', '.join(LEARNERS)}")
    if "report" in names and len(names) > 1:
        parser.error("report stands alone")
    if options.data is None and names != ["report"]:
        parser.error("--data DIR is needed: the folder of data sets")
    torch.set_num_threads(options.threads)
    scale = SMOKE if options.smoke else FULL
    model = load_model(options.model)
    results = Results(options.folder / model.spec.fingerprint.removeprefix("sha256:")[:12])
    asked = _asked(scale, model, options.tasks, options.learners)
    texts = _texts_asked(scale, options)
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if names == ["report"]:
        facts = _facts(options.model, model, scale)
        made = report(scale, results, facts, results.folder, options.page, asked, None if model.reads_whole else texts)
        print("\n\n".join(made.values()))
        return
    for name in names:
        print(f"... {name}", flush=True)
        laboratory = Laboratory(options.model, options.data, results, LLM(model))
        if name == SUPERGLUE:
            is_done = run_all(laboratory, results, options.data, asked, until)
        elif name == generation.NAME:
            is_done = run_lines(laboratory, results, lambda: generation.plan(texts, results), until)
        else:
            cells = [cell for _, cell in plan(name, scale) if options.tasks is None or cell.task in options.tasks]
            is_done = laboratory.run(cells, until)
        if not is_done:
            print("    out of time; the same command goes on", flush=True)
            break


def _asked(scale: Scale, model: FrozenModel, tasks: Sequence[str] | None, learners: Sequence[str] | None) -> Asked:
    """Say what is wanted of SuperGLUE: under a head where the model reads texts whole, else as texts."""
    return Asked(
        scale,
        "head" if model.reads_whole else "text",
        tuple(task for task in TITLES if tasks is None or task in tasks),
        tuple(label for label in LEARNERS if learners is None or label in learners),
    )


def _texts_asked(scale: Scale, options: argparse.Namespace) -> generation.Asked:
    """Say what is wanted of generation."""
    tasks, learners = options.tasks, options.learners
    own = "" if options.model == DEMO_MODEL_PATH else "_" + re.sub(r"\W", "_", options.model.name)
    return generation.Asked(
        scale,
        tuple(name for name in generation.SIZES if tasks is None or name in tasks),
        tuple(label for label in generation.LEARNERS if learners is None or label in learners),
        options.sizes,
        generation.NAME + own,
    )


def _facts(folder: Path, model: FrozenModel, scale: Scale) -> dict[str, str]:
    """Return what every table has in common."""
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    return {
        "model": f"{model.spec.architecture}, {parameters:,} parameters, {model.spec.fingerprint}",
        "seeds": f"{scale.num_seeds}; they draw the training rows, their order and the start",
        "rows": f"{scale.num_train} train, half of {scale.num_validation} select the step, {scale.num_held_out} report",
        "steps": ", ".join(f"{task} {SETS[task].num_steps}" for task in scale.core_tasks)
        + f", of {scale.batch_size} rows; weights 1/{WEIGHT_STEPS_DIVISOR} of that; sweeps {scale.max_sweep_steps}",
        "training": "AdamW, constant rate after 5 % warm-up, gradient norms clipped at 1, no dropout; the best of "
        f"{scale.num_evaluations} evaluations on validation rows is kept",
        "intervals": "mean over seeds ± half of the 95 % interval of Student's t",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, PEFT {peft.__version__}",
    }


if __name__ == "__main__":
    main()
