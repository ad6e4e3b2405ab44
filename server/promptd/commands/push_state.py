"""What earlier runs of `promptd prompts push` have finished: a log that the next run reads to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def default_state_file() -> Path:
    """Return where the log lies where nothing else was asked for."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "promptd" / "push.jsonl"


class PushState:
    """One line for each prompt that a server has acknowledged. A torn last line is as if it was not written."""

    def __init__(self, path: Path, url: str, *, reads_earlier: bool) -> None:
        self._path = path
        self._url = url
        self._done = self._read() if reads_earlier else {}

    def is_done(self, name: str, digest: str, current: Mapping[str, str]) -> bool:
        """Return whether these bytes were pushed before and are still what the server serves under the name."""
        earlier = self._done.get(name)
        return earlier is not None and earlier == (digest, current.get(name))

    def add(self, name: str, digest: str, version: str) -> None:
        """Note that a server has acknowledged it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"url": self._url, "name": name, "digest": digest, "version": version}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> dict[str, tuple[str, str]]:
        done: dict[str, tuple[str, str]] = {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return done
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["url"] == self._url:
                    done[entry["name"]] = (entry["digest"], entry["version"])
            except (ValueError, KeyError, TypeError):
                continue
        return done
