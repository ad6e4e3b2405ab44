"""promptd: one frozen model, many learned prompts, one batch.

`promptd.LLM` is the engine without a server; it is imported on first use, so that the client and the command line
start without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptd.engine.request import SamplingParams
    from promptd.llm import LLM, Completion

__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the engine's public names when they are asked for."""
    if name in ("LLM", "Completion"):
        from promptd import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from promptd.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'promptd' has no attribute {name!r}")
