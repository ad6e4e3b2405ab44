"""A PEFT folder as it is sent: its two files, checked only for being there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from promptd_client.errors import LocalFileError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """The bytes of both files."""

    config: bytes
    weights: bytes


def is_peft_folder(folder: str | Path) -> bool:
    """Return whether a folder looks like a PEFT adapter, whatever its weights' format."""
    return (Path(folder) / CONFIG_NAME).is_file()


def read_peft_folder(folder: str | Path | PeftFolder) -> PeftFolder:
    """Read both files, or say what is missing."""
    if isinstance(folder, PeftFolder):
        return folder
    path = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            hint = ""
            if name == WEIGHTS_NAME and (path / PICKLE_NAME).is_file():
                hint = f"; {PICKLE_NAME} is a pickle: run `promptd convert {path}` first"
            raise LocalFileError(f"{path}: no {name}{hint}")
    try:
        config, weights = (path / CONFIG_NAME).read_bytes(), (path / WEIGHTS_NAME).read_bytes()
        plain = json.loads(config)
    except OSError as error:
        raise LocalFileError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise LocalFileError(f"{path}: {CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise LocalFileError(f"{path}: {CONFIG_NAME} is not a JSON object")
    return PeftFolder(config, weights)


def read_content(source: bytes | str | Path) -> bytes:
    """Return bytes as they are, or a file's."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise LocalFileError(f"{source}: cannot be read: {error}") from error
