"""Training of prompts on the frozen model: methods, data, trainer, evaluation."""

from promptd.training.artifact import make_artifact, provenance, scores_json
from promptd.training.checks import from_json
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
from promptd.training.encoding import Encoded, TaskFormat, encode_examples, label_word_ids
from promptd.training.evaluation import Scores, evaluate, label_scores, majority_share, token_loss
from promptd.training.forward import forward_texts, prompt_key_values
from promptd.training.losses import training_loss
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
from promptd.training.sidecar import method_from_sidecar, sidecar_bytes
from promptd.training.trainer import Progress, PromptTrainer, TrainingConfig, TrainingResult

__all__ = [
    "METHODS",
    "Encoded",
    "Example",
    "LowRankConfig",
    "MethodConfig",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "Progress",
    "PromptMethod",
    "PromptTrainer",
    "PromptTuningConfig",
    "ResidualConfig",
    "Scores",
    "SuperPosConfig",
    "TaskFormat",
    "TrainingConfig",
    "TrainingDataError",
    "TrainingResult",
    "UlptConfig",
    "build_method",
    "data_digest",
    "encode_examples",
    "evaluate",
    "example_of",
    "forward_texts",
    "from_json",
    "label_scores",
    "label_word_ids",
    "majority_share",
    "make_artifact",
    "method_from_sidecar",
    "method_json",
    "method_values",
    "parse_examples",
    "parse_method",
    "parse_objects",
    "prompt_key_values",
    "provenance",
    "read_examples",
    "read_lines",
    "scores_json",
    "sidecar_bytes",
    "split_examples",
    "token_loss",
    "training_loss",
]
