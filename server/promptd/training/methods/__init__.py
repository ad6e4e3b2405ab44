"""Ways of learning a prompt, one file each, behind one interface."""

from promptd.training.methods.base import PromptMethod
from promptd.training.methods.build import build_method
from promptd.training.methods.config import MethodConfig
from promptd.training.methods.low_rank import LowRankConfig, LowRankPrompt
from promptd.training.methods.p_tuning_v2 import PTuningV2, PTuningV2Config
from promptd.training.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from promptd.training.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptd.training.methods.registry import METHODS, method_json, method_values, parse_method
from promptd.training.methods.residual import ResidualConfig, ResidualPromptTuning
from promptd.training.methods.superpos import SuperPosConfig, SuperPosPrompt
from promptd.training.methods.ulpt import UlptConfig, UltraLowPromptTuning

__all__ = [
    "METHODS",
    "LowRankConfig",
    "LowRankPrompt",
    "MethodConfig",
    "PTuningV2",
    "PTuningV2Config",
    "PrefixTuning",
    "PrefixTuningConfig",
    "PromptMethod",
    "PromptTuning",
    "PromptTuningConfig",
    "ResidualConfig",
    "ResidualPromptTuning",
    "SuperPosConfig",
    "SuperPosPrompt",
    "UlptConfig",
    "UltraLowPromptTuning",
    "build_method",
    "method_json",
    "method_values",
    "parse_method",
]
