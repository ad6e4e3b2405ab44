"""What the papers say, what was measured here, and whether the two agree: one line a behaviour."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tests.bench.experiments.plans import BOTTLENECKS, FULL_TUNING, INITS, LENGTHS, LORA, MLP, PREFIX, PT, RPT, SHOTS
from tests.bench.experiments.stats import Interval
from tests.bench.experiments.tables import (
    Found,
    accuracy,
    common_tasks,
    difference,
    loss,
    markdown,
    mean_over,
    step_ratios,
    values,
)

YES, NO, OPEN = "yes", "**no**", "cannot be told"
MARGIN = 3.0
"""Points within which `as good as` holds."""

Line = tuple[str, str, str, str]
"""(behaviour, source, measured, agrees)"""


def behaviours_table(found: Mapping[str, Found]) -> str:
    """Return the table; a behaviour whose cells are missing says so."""
    rows = []
    for behaviour, source, measure in _ALL:
        try:
            measured, agrees = measure(found)
        except (KeyError, ValueError, statistics.StatisticsError):
            measured, agrees = "not run", "-"
        rows.append([behaviour, source, measured, agrees])
    return markdown(["behaviour", "source", "measured here", "agrees"], rows)


def _mean(found: Found, label: str, tasks: Sequence[str]) -> float:
    """Return a learner's mean accuracy over tasks and seeds."""
    return Interval.of(list(mean_over(found, label, tasks, accuracy).values())).mean


def _gap(found: Found, ours: str, theirs: str) -> Interval:
    """Return the mean difference of accuracy over all classification tasks, paired by seed."""
    tasks = common_tasks(found, ours, theirs)
    gap = difference(mean_over(found, ours, tasks, accuracy), mean_over(found, theirs, tasks, accuracy))
    return Interval.of(list(gap.values()))


def _verdict(gap: Interval) -> str:
    return {1: YES, -1: NO, 0: OPEN}[gap.sign]


def _at_least(gap: Interval) -> str:
    """Judge a claim of `as good as`: the whole interval must lie above `-MARGIN`."""
    if gap.sign < 0:
        return NO
    return YES if gap.half is not None and gap.mean - gap.half >= -MARGIN else OPEN


def _ratios(found: Found, ours: str, theirs: str) -> list[float]:
    tasks = common_tasks(found, ours, theirs)
    given = [ratio for task in tasks for ratio in step_ratios(found, ours, task, theirs)]
    return [float("inf") if ratio is None else ratio for ratio in given]


def _score(found: Mapping[str, Found]) -> tuple[str, str]:
    gap = _gap(found["core"], RPT, PT)
    return f"{gap.shown(1)} points", _verdict(gap)


def _over_settings(found: Mapping[str, Found]) -> tuple[str, str]:
    """Compare at every rate and start that was tried; a seed's settings are averaged: they are not independent."""
    gaps: dict[int, list[float]] = {}
    settings = {
        (name, label.split(" @ ")[1]): found[name]
        for name in ("rates", "inits")
        for label in found[name]
        if (name, label.split(" @ ")[1]) != ("inits", INITS[1])  # the sweep of rates has it
    }
    for (_, setting), own in settings.items():
        ours, theirs = f"{RPT} @ {setting}", f"{PT} @ {setting}"
        for task in common_tasks(own, ours, theirs):
            for seed, gap in difference(values(own, ours, task, accuracy), values(own, theirs, task, accuracy)).items():
                gaps.setdefault(seed, []).append(gap)
    gap = Interval.of([statistics.mean(own) for own in gaps.values()])
    better = sum(value > 0 for own in gaps.values() for value in own)
    count = sum(map(len, gaps.values()))
    return f"{gap.shown(1)} points; better in {better} of {count} pairs", _verdict(gap)


def _half_the_steps(found: Mapping[str, Found]) -> tuple[str, str]:
    ratios = _ratios(found["core"], RPT, PT)
    middle = statistics.median(ratios)
    held = sum(ratio <= 0.5 for ratio in ratios)
    return f"median ratio {middle:.2f}; at most half in {held} of {len(ratios)}", YES if middle <= 0.5 else NO


def _texts(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["core"]
    gap = Interval.of(list(difference(values(own, RPT, "e2e", loss), values(own, PT, "e2e", loss)).values()))
    ratios = step_ratios(own, RPT, "e2e", PT)
    middle = statistics.median([float("inf") if ratio is None else ratio for ratio in ratios])
    agrees = YES if gap.sign < 0 and middle <= 0.5 else NO if gap.sign > 0 else OPEN
    return f"loss {gap.shown(3)}; median ratio of steps {_number(middle)}", agrees


def _same_rate(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["rates"]
    each = {}
    for label in own:
        if label.startswith(f"{PT} @"):
            rate = label.split(" @ ")[1]
            each[rate] = statistics.median(_ratios(own, f"{RPT} @ {rate}", label))
    shown = ", ".join(f"{rate}: {_number(ratio)}" for rate, ratio in each.items())
    return f"median ratio at rate {shown}", YES if all(ratio < 1 for ratio in each.values()) else NO


def _slower(found: Mapping[str, Found]) -> tuple[str, str]:
    ratios = _ratios(found["core"], MLP, PT)
    middle = statistics.median(ratios)
    return f"median ratio {_number(middle)}", YES if middle > 1 else NO


def _flat(found: Mapping[str, Found]) -> tuple[str, str]:
    own, spreads = found["rates"], {}
    for learner in (PT, RPT):
        labels = [label for label in own if label.startswith(f"{learner} @")]
        means = [
            Interval.of(list(mean_over(own, label, common_tasks(own), accuracy).values())).mean for label in labels
        ]
        spreads[learner] = max(means) - min(means)
    shown = ", ".join(f"{learner} {spread:.1f}" for learner, spread in spreads.items())
    return f"best less worst rate, points: {shown}", YES if spreads[RPT] < spreads[PT] / 2 else NO


def _inits(found: Mapping[str, Found]) -> tuple[str, str]:
    gaps = {
        learner: _gap(found["inits"], f"{learner} @ {INITS[1]}", f"{learner} @ {INITS[0]}") for learner in (PT, RPT)
    }
    shown = "; ".join(f"{learner} {gap.shown(1)}" for learner, gap in gaps.items())
    agrees = YES if gaps[PT].sign > 0 and gaps[RPT].sign == 0 else OPEN if gaps[PT].sign == 0 else NO
    return f"vocabulary less noise, points: {shown}", agrees


def _order_of_inits(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["inits"]
    means = [
        Interval.of(list(mean_over(own, f"{PT} @ {init}", common_tasks(own), accuracy).values())).mean for init in INITS
    ]
    shown = ", ".join(f"{init} {mean:.1f}" for init, mean in zip(INITS, means, strict=True))
    return f"{PT}: {shown}", YES if means == sorted(means) else NO


def _ten_against_hundred(found: Mapping[str, Found]) -> tuple[str, str]:
    gap = _gap(found["lengths"], f"{RPT} @ 10", f"{PT} @ 100")
    return f"{gap.shown(1)} points", _at_least(gap)


def _every_length(found: Mapping[str, Found]) -> tuple[str, str]:
    gaps = {count: _gap(found["lengths"], f"{RPT} @ {count}", f"{PT} @ {count}") for count in LENGTHS}
    shown = ", ".join(f"{count}: {gap.shown(1)}" for count, gap in gaps.items())
    return f"points at {shown}", YES if all(gap.mean > 0 for gap in gaps.values()) else NO


def _flattens(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["lengths"]
    means = {count: _mean(own, f"{PT} @ {count}", common_tasks(own)) for count in LENGTHS}
    shown = ", ".join(f"{count}: {mean:.1f}" for count, mean in means.items())
    return f"{PT} at {shown}", YES if means[10] - means[2] > means[100] - means[10] else NO


def _few_shots(found: Mapping[str, Found]) -> tuple[str, str]:
    gaps = {count: _gap(found["shots"], f"{RPT} @ {count}", f"{PT} @ {count}") for count in SHOTS}
    shown = ", ".join(f"{count}: {gap.shown(1)}" for count, gap in gaps.items())
    return f"points at {shown}", YES if gaps[5].mean > gaps[20].mean > 0 else NO


def _bottleneck(found: Mapping[str, Found]) -> tuple[str, str]:
    gap = _gap(found["ablations"], f"residual, bottleneck {BOTTLENECKS[0]}", RPT)
    return f"50 less 256: {gap.shown(1)} points", _at_least(gap)


def _shared(found: Mapping[str, Found]) -> tuple[str, str]:
    gap = _gap(found["ablations"], RPT, "residual, network for each token")
    return f"{gap.shown(1)} points", _verdict(gap)


def _norm(found: Mapping[str, Found]) -> tuple[str, str]:
    gap = _gap(found["ablations"], RPT, "residual, no LayerNorm")
    return f"{gap.shown(1)} points", _verdict(gap)


def _ulpt(found: Mapping[str, Found]) -> tuple[str, str]:
    gap = _gap(found["ablations"], "ULPT, 64 numbers a token", PT)
    return f"{gap.shown(1)} points", _at_least(gap)


def _labels_kept(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["inits"]
    kept = {
        learner: statistics.mean(
            result["labels_kept"] for task in common_tasks(own) for _, result in own[f"{learner} @ class_labels"][task]
        )
        for learner in (PT, RPT)
    }
    shown = ", ".join(f"{learner} {share:.0%}" for learner, share in kept.items())
    return f"slots still nearest to their label: {shown}", YES if kept[PT] > 0.5 else NO


def _placement(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["prefixes"]
    lines = {label: values(own, label, "e2e", loss) for label in (PREFIX, "embeddings alone", "infix")}
    base = lines.pop(PREFIX)
    gaps = {label: Interval.of(list(difference(other, base).values())) for label, other in lines.items()}
    shown = "; ".join(f"{label} {gap.shown(3)}" for label, gap in gaps.items())
    worst = min(gap.sign for gap in gaps.values())
    return f"E2E loss, less prefix's: {shown}", {1: YES, 0: OPEN, -1: NO}[worst]


def _stable(found: Mapping[str, Found]) -> tuple[str, str]:
    own = found["prefixes"]
    spreads = {
        name: statistics.stdev(values(own, label, "e2e", loss).values())
        for name, label in (("network", PREFIX), ("direct", "keys and values learned directly"))
    }
    shown = ", ".join(f"{name} {spread:.3f}" for name, spread in spreads.items())
    return f"deviation of the E2E loss over seeds: {shown}", YES if spreads["network"] < spreads["direct"] else NO


def _few_rows(found: Mapping[str, Found]) -> tuple[str, str]:
    gaps = {count: _gap(found["shots"], f"{RPT} @ {count}", f"{LORA} @ {count}") for count in SHOTS}
    shown = ", ".join(f"{count}: {gap.shown(1)}" for count, gap in gaps.items())
    return f"points at {shown} rows a label", _verdict(gaps[5])


def _elsewhere(found: Mapping[str, Found]) -> tuple[str, str]:
    own, gaps = found["core"], []
    for name in ("mr", "cr"):

        def read(result: dict[str, object], name: str = name) -> float:
            shift = result["shift"]
            return 100 * shift[name]["accuracy"]  # type: ignore[index, no-any-return]

        gap = difference(values(own, RPT, "sst2", read), values(own, FULL_TUNING, "sst2", read))
        gaps.append(Interval.of(list(gap.values())))
    shown = ", ".join(f"{name} {gap.shown(1)}" for name, gap in zip(("MR", "CR"), gaps, strict=True))
    return f"residual less full fine-tuning, points: {shown}", _verdict(max(gaps, key=lambda gap: abs(gap.mean)))


def _number(ratio: float) -> str:
    return "never" if ratio == float("inf") else f"{ratio:.2f}"


_RPT = "Razdaibiedina et al. 2023"
_LESTER = "Lester et al. 2021"
_PREFIX = "Li & Liang 2021"
_ALL: Sequence = (
    ("residual beats prompt tuning, 10 tokens, mean of classification", f"{_RPT}, table 2 (+3 points, T5)", _score),
    ("... at equal rates and starts, over all that were tried", f"{_RPT}, 5.2 and 5.3", _over_settings),
    ("... in at most half the steps to prompt tuning's best loss", f"{_RPT}, fig. 3", _half_the_steps),
    ("... both, for generated texts (E2E), at the core table's rate", "not asked there", _texts),
    ("... in fewer steps at equal learning rates", f"{_RPT}, fig. 3", _same_rate),
    ("an MLP without the skip is slower than prompt tuning", f"{_RPT}, fig. 3 and 7", _slower),
    ("residual is flat over learning rates, prompt tuning is not", f"{_RPT}, 5.2", _flat),
    ("residual does not mind a start from noise, prompt tuning does", f"{_RPT}, 5.3", _inits),
    ("class labels >= vocabulary >= noise as a start", f"{_LESTER}, fig. 3", _order_of_inits),
    ("residual with 10 tokens >= prompt tuning with 100", f"{_RPT}, abstract", _ten_against_hundred),
    ("residual gains at every length", f"{_RPT}, 5.5", _every_length),
    ("prompt tuning gains less from 10 to 100 tokens than from 2 to 10", f"{_LESTER}, fig. 3", _flattens),
    ("residual gains more at 5 than at 20 rows a label", f"{_RPT}, 5.4", _few_shots),
    ("the bottleneck's width does not matter from 50 on", f"{_RPT}, 5.6", _bottleneck),
    ("one network for all tokens beats one each on few rows", f"{_RPT}, 5.6", _shared),
    ("LayerNorm helps", f"{_RPT}, 3.2", _norm),
    ("class labels stay the nearest words", f"{_LESTER}, 7", _labels_kept),
    ("a tenth of the numbers (ULPT) does as well as prompt tuning", "Wu et al. 2025, table 1", _ulpt),
    ("a prefix beats embeddings alone and an infix", f"{_PREFIX}, table 4", _placement),
    ("a network makes prefixes more stable", f"{_PREFIX}, 4.3", _stable),
    ("a prompt beats changed weights (here LoRA r=8) on few rows", f"{_PREFIX}, 6.3", _few_rows),
    ("a prompt does better than full fine-tuning off its domain", f"{_LESTER}, table 1", _elsewhere),
)
