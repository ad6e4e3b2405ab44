"""What `promptd prompts push` finds on this machine: PEFT folders, trained prompts and files, each with its name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from promptd_client import LocalFileError, PeftFolder, is_peft_folder, read_peft_folder


@dataclass(frozen=True, slots=True)
class Source:
    """One prompt on disk: a PEFT folder, or a safetensors file."""

    name: str
    path: Path

    @property
    def is_peft(self) -> bool:
        """True for a folder."""
        return self.path.is_dir()

    def read(self) -> PeftFolder | bytes:
        """Read everything that would be sent."""
        if self.is_peft:
            return read_peft_folder(self.path)
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise LocalFileError(f"{self.path}: cannot be read: {error}") from error


def digest_of(content: PeftFolder | bytes) -> str:
    """Return a digest of what is sent."""
    digest = hashlib.sha256()
    for part in (content,) if isinstance(content, bytes) else (content.config, content.weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def find_sources(paths: Iterable[Path], name: str | None = None) -> list[Source]:
    """Return every prompt at or below the paths, and every file that is named itself, in a stable order.

    In folders these are PEFT folders, and prompts of `promptd train`: safetensors files with a card beside them.
    """
    sources = [
        Source(each.stem if each.is_file() else each.resolve().name, each) for path in paths for each in _search(path)
    ]
    if name is None:
        return sources
    if len(sources) != 1:
        raise LocalFileError(f"--name names one prompt, but {len(sources)} were found")
    return [Source(name, sources[0].path)]


def _search(path: Path) -> Iterator[Path]:
    if path.is_file() or is_peft_folder(path):
        yield path
        return
    if not path.is_dir():
        raise LocalFileError(f"{path}: there is no such file or folder")
    found = False
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(each for each in subfolders if not each.startswith("."))
        if is_peft_folder(folder):
            subfolders.clear()  # what lies inside are its checkpoints
            found = True
            yield Path(folder)
            continue
        for file in sorted(Path(folder, name) for name in files if name.endswith(".safetensors")):
            if file.with_suffix(".json").is_file():
                found = True
                yield file
    if not found:
        raise LocalFileError(f"{path}: no PEFT folder (adapter_config.json) and no trained prompt in it or below")
