"""Adapters of every kind, as PEFT makes them for any task."""

from __future__ import annotations

import pytest
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

WARNS = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
"""Marks of tests that run PEFT: what it warns of is not ours."""


def adapter_configs(task_type: str) -> dict[str, PeftConfig]:
    """Name -> settings of PEFT, made anew: it changes what it is given."""
    return {
        "prompt": PromptTuningConfig(task_type=task_type, num_virtual_tokens=7),
        "p_tuning": PromptEncoderConfig(task_type=task_type, num_virtual_tokens=5, encoder_hidden_size=32),
        "prefix": PrefixTuningConfig(task_type=task_type, num_virtual_tokens=4),
        "prefix_projected": PrefixTuningConfig(
            task_type=task_type, num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=32
        ),
    }
