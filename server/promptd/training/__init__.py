"""Training of prompts on the frozen model: methods, data, trainer, evaluation."""

from promptd.training.artifact import make_artifact, provenance
from promptd.training.checks import from_json
from promptd.training.config import TrainingConfig
from promptd.training.context import FrozenContext, chain_context
from promptd.training.data import (
    Example,
    TrainingDataError,
    data_digest,
    example_of,
    parse_examples,
    parse_objects,
    read_examples,
    read_lines,
    split_examples,
)
from promptd.training.distill_config import DistillConfig
from promptd.training.encoding import Encoded, TaskFormat, encode_examples, label_word_ids
from promptd.training.evaluation import evaluate
from promptd.training.forward import PromptedTexts, forward_groups, forward_texts, prompt_key_values
from promptd.training.job import Progress, TrainingJob, Watcher
from promptd.training.loop import TrainingLoop
from promptd.training.methods import (
    METHODS,
    LowRankConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptMethod,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    SuperPosConfig,
    UlptConfig,
    build_method,
    method_json,
    method_values,
    parse_method,
)
from promptd.training.objectives import CompletionObjective, LabelObjective, Objective, objective_for
from promptd.training.result import TrainingResult
from promptd.training.scores import Scores, majority_share
from promptd.training.sidecar import method_from_sidecar, sidecar_bytes
from promptd.training.teacher import Teacher
from promptd.training.trainer import Outcome, Trainer, train
from promptd.training.worker import TrainingWorker

__all__ = [
    "METHODS",
    "CompletionObjective",
    "DistillConfig",
    "Encoded",
    "Example",
    "FrozenContext",
    "LabelObjective",
    "LowRankConfig",
    "MethodConfig",
    "Objective",
    "Outcome",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "Progress",
    "PromptMethod",
    "PromptTuningConfig",
    "PromptedTexts",
    "ResidualConfig",
    "Scores",
    "SuperPosConfig",
    "TaskFormat",
    "Teacher",
    "Trainer",
    "TrainingConfig",
    "TrainingDataError",
    "TrainingJob",
    "TrainingLoop",
    "TrainingResult",
    "TrainingWorker",
    "UlptConfig",
    "Watcher",
    "build_method",
    "chain_context",
    "data_digest",
    "encode_examples",
    "evaluate",
    "example_of",
    "forward_groups",
    "forward_texts",
    "from_json",
    "label_word_ids",
    "majority_share",
    "make_artifact",
    "method_from_sidecar",
    "method_json",
    "method_values",
    "objective_for",
    "parse_examples",
    "parse_method",
    "parse_objects",
    "prompt_key_values",
    "provenance",
    "read_examples",
    "read_lines",
    "sidecar_bytes",
    "split_examples",
    "train",
]
