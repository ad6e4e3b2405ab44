"""promptd: one frozen model, many learned prompts, one batch."""

__version__ = "0.1.0"
