"""From results to Markdown tables, one function a table; nothing here runs a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench.experiments.cells import Cell, Results
from tests.bench.experiments.plans import BARE, PT, RPT, WEIGHTS, Scale, plan
from tests.bench.experiments.sets import LABELLED, SETS
from tests.bench.experiments.stats import Interval, best_loss, steps_to

Found = Mapping[str, Mapping[str, Sequence[tuple[Cell, dict[str, Any]]]]]
"""label -> task -> its cells that have results, in the order of seeds."""
NOTHING = "-"


def found_for(experiment: str, scale: Scale, results: Results) -> Found:
    """Return what there is of an experiment."""
    found: dict[str, dict[str, list[tuple[Cell, dict[str, Any]]]]] = {}
    for label, cell in plan(experiment, scale):
        result = results.get(cell)
        own = found.setdefault(label, {}).setdefault(cell.task, [])
        if result is not None and "error" not in result:
            own.append((cell, result))
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def values(found: Found, label: str, task: str, read: Callable[[dict[str, Any]], float | None]) -> dict[int, float]:
    """Return seed -> value."""
    read_all = {cell.seed: read(result) for cell, result in found.get(label, {}).get(task, ())}
    return {seed: value for seed, value in read_all.items() if value is not None}


def common_tasks(found: Found, *labels: str) -> list[str]:
    """Return the classification tasks on which these learners, or all, have results."""
    asked = labels or tuple(found)
    return [task for task in LABELLED if asked and all(found.get(label, {}).get(task) for label in asked)]


def accuracy(result: dict[str, Any]) -> float | None:
    """Held-out accuracy, in percent."""
    value = result["held_out"]["accuracy"]
    return None if value is None else 100 * value


def loss(result: dict[str, Any]) -> float:
    """Held-out loss in nats per target token."""
    return float(result["held_out"]["loss"])


def bleu(result: dict[str, Any]) -> float | None:
    """Held-out BLEU."""
    return result["held_out"].get("bleu")


def shown(numbers: Mapping[int, float], digits: int = 1) -> str:
    """Return `mean ± half` over seeds."""
    return Interval.of(list(numbers.values())).shown(digits) if numbers else NOTHING


def mean_over(
    found: Found, label: str, tasks: Sequence[str], read: Callable[[dict[str, Any]], float | None]
) -> dict[int, float]:
    """Return seed -> mean over tasks, for seeds that have all of them."""
    each = [values(found, label, task, read) for task in tasks]
    seeds = set.intersection(*(set(own) for own in each)) if each else set()
    return {seed: statistics.mean(own[seed] for own in each) for seed in sorted(seeds)}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Return seed -> difference, paired."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))}


def core_table(found: Found) -> str:
    """Scores and costs of every learner on every task."""
    tasks = [task for task in LABELLED if any(task in own for own in found.values())]
    header = [
        "learner", *(SETS[task].title.split(":")[0] for task in tasks), f"mean of {len(tasks)}", "E2E BLEU", "E2E loss",
        "Shakespeare loss", "stored bytes", "CPU seconds", "tokens/s",
    ]  # fmt: skip
    rows = [["majority class", *(_majority(found, task) for task in tasks), "", "", "", "", "0", "0", ""]]
    rows[0][len(tasks) + 1] = _mean_of([rows[0][at + 1] for at in range(len(tasks))])
    for label in found:
        seconds, speed = cost(found[label])
        rows.append(
            [
                label,
                *(shown(values(found, label, task, accuracy)) for task in tasks),
                shown(mean_over(found, label, tasks, accuracy)),
                shown(values(found, label, "e2e", bleu)),
                shown(values(found, label, "e2e", loss), 3),
                shown(values(found, label, "shakespeare", loss), 3),
                stored(found[label]),
                seconds,
                speed,
            ]
        )
    return markdown(header, rows)


def _majority(found: Found, task: str) -> str:
    shares = {result["majority"] for _, result in found.get(BARE, {}).get(task, ())}
    return f"{100 * max(shares):.1f}" if shares else NOTHING


def _mean_of(cells: Sequence[str]) -> str:
    return NOTHING if NOTHING in cells else f"{statistics.mean(map(float, cells)):.1f}"


def stored(own: Mapping[str, Sequence[tuple[Cell, dict[str, Any]]]]) -> str:
    """Return the bytes that a tenant stores."""
    sizes = sorted({result["stored_bytes"] for cells in own.values() for _, result in cells})
    if not sizes:
        return NOTHING
    return f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"


def cost(own: Mapping[str, Sequence[tuple[Cell, dict[str, Any]]]]) -> tuple[str, str]:
    """Return the median CPU seconds of a training, and tokens/s over all of them."""
    trained = [result for cells in own.values() for _, result in cells if "cpu_seconds" in result]
    if not trained:
        return "0", ""
    seconds = [result["cpu_seconds"] for result in trained]
    speed = sum(result["train_tokens"] for result in trained) / sum(seconds)
    return f"{statistics.median(seconds):.0f}", f"{speed:,.0f}"


def claim_table(found: Found, against: str = PT) -> str:
    """All prompts against prompt tuning, paired by seed: scores, and steps to its best validation loss."""
    rows = []
    for label in [name for name in found if name not in (against, *WEIGHTS) and _is_trained(found[name])]:
        for task in found[label]:
            read = accuracy if task in LABELLED else loss
            gap = difference(values(found, label, task, read), values(found, against, task, read))
            ratios = step_ratios(found, label, task, against)
            if gap:
                digits = 1 if read is accuracy else 3
                rows.append([label, SETS[task].title.split(":")[0], shown(gap, digits), _ratios_shown(ratios)])
        tasks = [task for task in LABELLED if task in found[label]]
        gap = difference(mean_over(found, label, tasks, accuracy), mean_over(found, against, tasks, accuracy))
        ratios = [ratio for task in tasks for ratio in step_ratios(found, label, task, against)]
        if gap:
            rows.append([f"**{label}**", "**all classification**", f"**{shown(gap)}**", f"**{_ratios_shown(ratios)}**"])
    return markdown(["learner", "task", f"score less {against}'s", f"steps to {against}'s best loss : its own"], rows)


def step_ratios(found: Found, label: str, task: str, against: str) -> list[float | None]:
    """Return, for every seed, the steps to the other's best validation loss over the steps it took itself."""
    theirs = {cell.seed: result for cell, result in found.get(against, {}).get(task, ())}
    ratios: list[float | None] = []
    for cell, result in found.get(label, {}).get(task, ()):
        if cell.seed in theirs:
            goal = best_loss(theirs[cell.seed])
            own, other = steps_to(result, goal), steps_to(theirs[cell.seed], goal)
            ratios.append(None if own is None or other is None else own / other)
    return ratios


def _ratios_shown(ratios: Sequence[float | None]) -> str:
    reached = [ratio for ratio in ratios if ratio is not None]
    if not ratios:
        return NOTHING
    if len(reached) <= len(ratios) / 2:
        return f"not reached by {len(ratios) - len(reached)} of {len(ratios)}"
    middle = statistics.median([float("inf") if ratio is None else ratio for ratio in ratios])
    left = len(ratios) - len(reached)
    return f"{middle:.2f} (median of {len(ratios)}" + (f", {left} never" if left else "") + ")"


def _is_trained(own: Mapping[str, Sequence[tuple[Cell, dict[str, Any]]]]) -> bool:
    return any("curve" in result for cells in own.values() for _, result in cells)


def shift_table(found: Found) -> str:
    """Trained on SST-2, asked about other reviews."""
    rows = []
    for label in found:
        own = values(found, label, "sst2", accuracy)
        if own:
            elsewhere = [
                values(found, label, "sst2", lambda result, name=name: 100 * result["shift"][name]["accuracy"])
                for name in SETS["sst2"].shifts
            ]
            rows.append([label, shown(own), *map(shown, elsewhere)])
    return markdown(["learner, trained on SST-2", "SST-2", "MR (films)", "CR (products)"], rows)


def users_table(found: Found) -> str:
    """Loss on a user's answers under the user's own prompt and under another user's."""
    rows = []
    for label in found:
        own = values(found, label, "shakespeare", loss)
        other = values(found, label, "shakespeare", lambda result: result["shift"]["next_user"]["loss"])
        if len(own) > 1 and len(own) == len(other):
            others = {(seed + 1) % len(other): value for seed, value in other.items()}
            rows.append([label, shown(own, 3), shown(others, 3), shown(difference(own, others), 3)])
    return markdown(["learner", "a character's own", "the one before's", "own less other"], rows)


def branch_table(found: Found) -> str:
    """|phi(P)| / |P| of residual prompt tuning."""
    rows = []
    for task, cells in found.get(RPT, {}).items():
        for when in ("start", "best"):
            shares = [share for _, result in cells for share in result["branch_share"][when]]
            if shares:
                moments = [min(shares), statistics.median(shares), max(shares)]
                steps = "0" if when == "start" else ", ".join(str(result["best_step"]) for _, result in cells)
                rows.append([SETS[task].title.split(":")[0], steps, *(f"{value:.2f}" for value in moments)])
    return markdown(["task", "step, of each seed", "smallest", "median", "largest"], rows)


def grid_table(found: Found, name: str, *, with_loss: bool = True) -> str:
    """Labels of the form `learner @ value`: one line a learner and task, one column a value."""
    columns = list(dict.fromkeys(label.split(" @ ")[1] for label in found))
    learners = list(dict.fromkeys(label.split(" @ ")[0] for label in found))
    rows = []
    for learner in learners:
        tasks = list(
            dict.fromkeys(task for label in found if label.startswith(f"{learner} @") for task in found[label])
        )
        for task in tasks:
            title = SETS[task].title.split(":")[0]
            read, digits, score = (accuracy, 1, "accuracy") if task in LABELLED else (loss, 3, "held-out loss")
            cells = [shown(values(found, f"{learner} @ {column}", task, read), digits) for column in columns]
            rows.append([learner, title, score, *cells])
            if with_loss:
                cells = [shown(values(found, f"{learner} @ {column}", task, best_loss), 3) for column in columns]
                rows.append([learner, title, "validation loss", *cells])
    return markdown(["learner", "task", name, *columns], rows)


def list_table(found: Found) -> str:
    """One line a learner: accuracy (or loss) on every task, validation loss, steps against the first learner."""
    tasks = list(dict.fromkeys(task for own in found.values() for task in own))
    header, first = ["learner"], next(iter(found))
    for task in tasks:
        title = SETS[task].title.split(":")[0]
        header += [f"{title} {'accuracy' if task in LABELLED else 'loss'}", "validation loss", "steps, of the first"]
    rows = []
    for label in found:
        row = [label]
        for task in tasks:
            is_label = task in LABELLED
            row.append(shown(values(found, label, task, accuracy if is_label else loss), 1 if is_label else 3))
            row.append(shown(values(found, label, task, best_loss), 3))
            row.append(_ratios_shown(step_ratios(found, label, task, first)))
        rows.append([*row, _numbers(found[label])])
    return markdown([*header, "trained numbers"], rows)


def _numbers(own: Mapping[str, Sequence[tuple[Cell, dict[str, Any]]]]) -> str:
    counts = sorted({result["trained_params"] for cells in own.values() for _, result in cells})
    return f"{counts[-1]:,}" if counts else NOTHING
