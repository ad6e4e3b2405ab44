"""Prompts that lie on this machine."""

from __future__ import annotations

from pathlib import Path

from promptd_store.artifact import BaseModelSpec, PromptArtifact
from promptd_store.codec import decode
from promptd_store.peft import read_peft


def read_prompt(path: str | Path, spec: BaseModelSpec) -> PromptArtifact:
    """Read a native or PEFT safetensors file, or a PEFT folder, with every check of an upload.

    Raises `ArtifactError`, and `OSError` where there is nothing to read.
    """
    path = Path(path)
    return read_peft(path, spec) if path.is_dir() else decode(path.read_bytes(), spec)
