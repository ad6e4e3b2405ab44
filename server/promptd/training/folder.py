"""A folder of trained prompts: what `promptd train` writes and goes on from.

NAME.safetensors is the prompt as it is served, NAME.sidecar.safetensors its parameters before folding, NAME.json its
card, which is written last: a prompt with a card is whole. While a job runs, NAME.checkpoint is where it would go on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promptd_store import PromptArtifact

from promptd.errors import ConflictError


class PromptFolder:
    """Reads and writes one folder, under its lock; whatever has its name is complete, also after a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder. Raises `ConflictError` where one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConflictError(f"another process trains into {self.path}", code="folder_in_use") from None
            yield

    def prompt_path(self, name: str) -> Path:
        """Return where a prompt lies."""
        return self.path / f"{name}.safetensors"

    def checkpoint_path(self, name: str) -> Path:
        """Return where a running job's checkpoint lies."""
        return self.path / f"{name}.checkpoint"

    def card(self, name: str) -> dict[str, Any] | None:
        """Return what is known about a finished prompt; None where there is none, or no card that can be read."""
        try:
            card = json.loads(self._card_path(name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return card if isinstance(card, dict) else None

    def save(self, name: str, artifact: PromptArtifact, sidecar: bytes, card: dict[str, Any]) -> None:
        """Write a finished prompt; its checkpoint goes."""
        self._card_path(name).unlink(missing_ok=True)  # of the prompt that is about to be replaced
        self._write(self.path / f"{name}.sidecar.safetensors", sidecar)
        self._write(self.prompt_path(name), bytes(artifact.content))
        self._write(self._card_path(name), json.dumps(card, indent=2, ensure_ascii=False).encode() + b"\n")
        self.checkpoint_path(name).unlink(missing_ok=True)

    def checkpoint(self, name: str, digest: str) -> bytes | None:
        """Return where the job of this digest goes on; None where it begins."""
        try:
            found, _, content = self.checkpoint_path(name).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        return content if found == digest.encode() else None

    def save_checkpoint(self, name: str, digest: str, content: bytes) -> None:
        """Keep where the job of this digest would go on, in the place of an earlier one."""
        self._write(self.checkpoint_path(name), digest.encode() + b"\n" + content)

    def _card_path(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_name(path.name + ".tmp")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
