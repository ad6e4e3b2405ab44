"""Training of prompts on the frozen model: methods, data, trainer, evaluation."""

from promptd.training.artifact import make_artifact, provenance, scores_json
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
from promptd.training.methods import INITS, METHODS, MethodConfig, PromptMethod, build_method
from promptd.training.sidecar import method_from_sidecar, sidecar_bytes
from promptd.training.trainer import Progress, PromptTrainer, TrainingConfig, TrainingResult

__all__ = [
    "INITS",
    "METHODS",
    "Encoded",
    "Example",
    "MethodConfig",
    "Progress",
    "PromptMethod",
    "PromptTrainer",
    "Scores",
    "TaskFormat",
    "TrainingConfig",
    "TrainingDataError",
    "TrainingResult",
    "build_method",
    "data_digest",
    "encode_examples",
    "evaluate",
    "example_of",
    "forward_texts",
    "label_scores",
    "label_word_ids",
    "majority_share",
    "make_artifact",
    "method_from_sidecar",
    "parse_examples",
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
