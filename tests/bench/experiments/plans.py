"""Which cells each experiment needs. A label is a line in the tables; several experiments may share a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from promptd.training import (
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    UlptConfig,
)
from promptd.training.schedules import ScheduleName
from tests.bench.experiments.ablations import EmbeddingPrefixConfig, LstmConfig, MlpConfig
from tests.bench.experiments.cells import Cell, ContextConfig, Learner
from tests.bench.experiments.infix import InfixConfig
from tests.bench.experiments.sets import CLASSIFICATION, SETS
from tests.bench.experiments.weights import WeightConfig


@dataclass(frozen=True)
class Scale:
    """How much each cell does."""

    num_seeds: int = 3
    num_train: int = 500
    num_validation: int = 100
    num_held_out: int = 300
    num_evaluations: int = 15
    batch_size: int = 8
    schedule: ScheduleName = "constant"
    """As the authors of both papers: under a falling rate, the schedule decides when a loss is reached."""
    max_steps: int = 10_000
    """At most so many steps; each set names its own number."""
    max_sweep_steps: int = 200
    """... in every experiment but the core table."""
    core_tasks: tuple[str, ...] = (*CLASSIFICATION, "e2e", "shakespeare")
    rate_tasks: tuple[str, ...] = ("trec", "ag_news", "e2e")
    small_tasks: tuple[str, ...] = ("trec",)
    """Short rows: for everything that takes many cells."""
    generation_sizes: tuple[int, ...] | None = None
    """Training rows of generation; None: each set's own."""

    @property
    def short(self) -> Scale:
        """The scale of sweeps."""
        return dataclasses.replace(self, max_steps=min(self.max_steps, self.max_sweep_steps))


FULL = Scale()
SMOKE = Scale(
    num_seeds=1, num_train=8, num_validation=4, num_held_out=4, num_evaluations=2, batch_size=2, max_steps=2,
    core_tasks=("snips", "e2e"), rate_tasks=("snips",), small_tasks=("snips",), generation_sizes=(4,),
)  # fmt: skip

PT, RPT, MLP, PREFIX = "prompt tuning", "residual", "MLP without skip", "prefix-tuning"
LORA, LORA_MATCHED, IA3, FULL_TUNING = "LoRA r=8", "LoRA, as many numbers", "IA3", "full fine-tuning"
BARE, INSTRUCTION, EXAMPLES = "bare model", "hand-written prompt", "examples in context"

PROMPTS: Mapping[str, MethodConfig] = {
    PT: PromptTuningConfig(learning_rate=3.0),
    RPT: ResidualConfig(learning_rate=3.0, network_learning_rate=3e-3),
    MLP: MlpConfig(learning_rate=3.0, network_learning_rate=3e-3),
    PREFIX: PrefixTuningConfig(),
}
"""Rates: the best of the sweep (experiment `rates`) on validation rows."""
WEIGHTS: Mapping[str, WeightConfig] = {
    LORA: WeightConfig("lora", 3e-3),
    LORA_MATCHED: WeightConfig("lora", 1e-2, rank=1, target_modules=("q_proj",)),
    IA3: WeightConfig("ia3", 0.09),
    FULL_TUNING: WeightConfig("full", 3e-4),
}
CONTEXTS: Mapping[str, Learner] = {
    BARE: ContextConfig("bare"),
    INSTRUCTION: ContextConfig("instruction"),
    EXAMPLES: ContextConfig("examples"),
}

RATES = (0.01, 0.3, 1.0, 3.0, 10.0)
FEW_RATES: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("ag_news", PT): (1.0, 3.0),
    ("ag_news", RPT): (1.0, 3.0),
    ("e2e", PT): (1.0, 3.0, 10.0),
    ("e2e", RPT): (3.0,),
}
"""Where rows are longer: fewer; on E2E only prompt tuning's, which residual prompt tuning is compared with."""
WEIGHT_RATES: Mapping[str, float] = {LORA: 3e-3, LORA_MATCHED: 1e-2, IA3: 3e-2, FULL_TUNING: 3e-4}
WEIGHT_FACTORS = (1 / 3, 1.0, 3.0)
LENGTHS = (2, 10, 100)
SHOTS = (5, 20, 100)
INITS = ("random_uniform", "sampled_vocabulary", "class_labels")
BOTTLENECKS = (50,)

ONE_SEED = ("rte", "e2e", "shakespeare")
"""Long rows: one seed says what changing weights reaches there; so it does for the smaller adapters everywhere."""
WEIGHT_STEPS_DIVISOR = 3
"""Weights learn in fewer steps than prompts: this part of them."""

Line = tuple[str, Cell]
"""A label and one of its cells."""


def _cells(
    scale: Scale, task: str, label: str, learner: Learner, *, num_seeds: int | None = None,
    num_per_label: int | None = None,
) -> list[Line]:  # fmt: skip
    count = scale.num_seeds if num_seeds is None else num_seeds
    num_steps = min(SETS[task].num_steps, scale.max_steps)
    if isinstance(learner, ContextConfig):
        num_steps = 0
    elif isinstance(learner, WeightConfig):
        num_steps = max(scale.num_evaluations, num_steps // WEIGHT_STEPS_DIVISOR)
    return [
        (
            label,
            Cell(
                task=task, learner=learner, seed=seed, num_train=scale.num_train,
                num_steps=num_steps,
                batch_size=scale.batch_size, num_validation=scale.num_validation, num_held_out=scale.num_held_out,
                num_evaluations=scale.num_evaluations, schedule=scale.schedule, num_per_label=num_per_label,
            ),
        )
        for seed in range(count)
    ]  # fmt: skip


def core(scale: Scale) -> list[Line]:
    """Four ways to learn a prompt, three ways to change weights, three ways to do neither."""
    lines: list[Line] = []
    for task in scale.core_tasks:
        for label, learner in {**PROMPTS, **CONTEXTS, **WEIGHTS}.items():
            # Nothing is drawn for these two, but a user's rows are the seed's.
            once = label in (BARE, INSTRUCTION) and not SETS[task].by_user
            once = once or (label in WEIGHTS and (task in ONE_SEED or label in (LORA_MATCHED, IA3)))
            lines += _cells(scale, task, label, learner, num_seeds=1 if once else None)
    return lines


def rates(scale: Scale) -> list[Line]:
    """Learning rates of prompt tuning and of residual prompt tuning."""
    lines: list[Line] = []
    for task in scale.rate_tasks:
        for label in (PT, RPT):
            for rate in RATES if task in scale.small_tasks else FEW_RATES[task, label]:
                learner = dataclasses.replace(PROMPTS[label], learning_rate=rate)
                lines += _cells(scale, task, f"{label} @ {rate:g}", learner)
    return lines


def weight_rates(scale: Scale) -> list[Line]:
    """Learning rates of what changes weights; one seed, to choose by."""
    lines: list[Line] = []
    for task in scale.small_tasks:
        for label, learner in WEIGHTS.items():
            for by in WEIGHT_FACTORS:
                other = dataclasses.replace(learner, learning_rate=WEIGHT_RATES[label] * by)
                lines += _cells(scale, task, f"{label} @ {by:.2g}", other, num_seeds=1)
    return lines


def inits(scale: Scale) -> list[Line]:
    """Where a prompt starts."""
    return [
        line
        for task in scale.small_tasks
        for label in (PT, RPT)
        for init in INITS
        for line in _cells(scale, task, f"{label} @ {init}", dataclasses.replace(PROMPTS[label], init=init))
    ]


def lengths(scale: Scale) -> list[Line]:
    """How many virtual tokens."""
    return [
        line
        for task in scale.small_tasks
        for label in (PT, RPT)
        for count in LENGTHS
        for line in _cells(
            scale, task, f"{label} @ {count}", dataclasses.replace(PROMPTS[label], num_virtual_tokens=count)
        )
    ]


def shots(scale: Scale) -> list[Line]:
    """How many rows of each label."""
    learners: dict[str, Learner] = {label: {**PROMPTS, **WEIGHTS}[label] for label in (PT, RPT, LORA)}
    return [
        line
        for task in scale.small_tasks
        for label, learner in learners.items()
        for count in SHOTS
        for line in _cells(scale, task, f"{label} @ {count}", learner, num_per_label=count)
    ]


def ablations(scale: Scale) -> list[Line]:
    """What of residual prompt tuning matters, and a prompt of few numbers."""
    residual = PROMPTS[RPT]
    learners: dict[str, MethodConfig] = {
        PT: PROMPTS[PT],
        RPT: residual,
        MLP: PROMPTS[MLP],
        "LSTM without skip": LstmConfig(learning_rate=PROMPTS[MLP].learning_rate),
        "residual, no LayerNorm": dataclasses.replace(residual, layer_norm=False),
        "residual, network's rate / 10": dataclasses.replace(residual, network_learning_rate=3e-4),
        "residual, network's rate x 10": dataclasses.replace(residual, network_learning_rate=3e-2),
        "residual, network for each token": dataclasses.replace(residual, separate_networks=True),
        "ULPT, 64 numbers a token": UlptConfig(),
        **{f"residual, bottleneck {size}": dataclasses.replace(residual, bottleneck_size=size) for size in BOTTLENECKS},
    }
    return [
        line
        for task in scale.small_tasks
        for label, learner in learners.items()
        for line in _cells(scale, task, label, learner)
    ]


def prefixes(scale: Scale) -> list[Line]:
    """Prefix-tuning's own ablations: without the network, embeddings alone, in the middle."""
    lines: list[Line] = []
    for label, learner in {
        PREFIX: PROMPTS[PREFIX],
        "keys and values learned directly": PTuningV2Config(),
        "embeddings alone": EmbeddingPrefixConfig(),
        "infix": InfixConfig(PrefixTuningConfig()),
    }.items():
        lines += _cells(scale, "e2e", label, learner)
    return lines


EXPERIMENTS: Mapping[str, Callable[[Scale], Sequence[Line]]] = {
    "core": core,
    "rates": rates,
    "weight_rates": weight_rates,
    "ablations": ablations,
    "inits": inits,
    "lengths": lengths,
    "shots": shots,
    "prefixes": prefixes,
}


def plan(name: str, scale: Scale) -> Sequence[Line]:
    """Return an experiment's cells, task by task."""
    return EXPERIMENTS[name](scale if name == "core" else scale.short)
