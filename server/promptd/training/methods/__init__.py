"""Ways of learning a prompt, one file each, behind one interface."""

from promptd.training.methods.base import PromptMethod
from promptd.training.methods.config import INITS, METHODS, MethodConfig, build_method
from promptd.training.methods.prefix import DirectPrefix, NetworkPrefix
from promptd.training.methods.prompt_tuning import PromptTuning
from promptd.training.methods.residual import ResidualPromptTuning

__all__ = [
    "INITS",
    "METHODS",
    "DirectPrefix",
    "MethodConfig",
    "NetworkPrefix",
    "PromptMethod",
    "PromptTuning",
    "ResidualPromptTuning",
    "build_method",
]
