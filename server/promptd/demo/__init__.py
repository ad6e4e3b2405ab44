"""The embedded demo: a small base model, prompts trained on it, and a slice of real data."""

from pathlib import Path

DEMO_MODEL_NAME = "promptd-demo"
DEMO_TENANT = "demo"
DEMO_MODEL_PATH = Path(__file__).parent / "model"
DEMO_PROMPTS_PATH = Path(__file__).parent / "prompts"
"""`<name>.safetensors` with its scores beside it in `<name>.json`."""
DEMO_DATA_PATH = Path(__file__).parent / "data"
