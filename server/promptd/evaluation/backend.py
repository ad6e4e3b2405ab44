"""Who answers: an engine in this process, a running server, or the server's own engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Subject:
    """A prompt that is evaluated, pinned to one version, and how its text reads."""

    name: str
    version: str
    template: str | None
    label_words: Mapping[str, str] | None
    max_tokens: int | None
    stop: tuple[str, ...]

    @classmethod
    def of(cls, name: str, version: str, manifest: Mapping[str, Any]) -> Subject:
        """Read what matters here from a manifest's plain values."""
        return cls(
            name,
            version,
            manifest.get("template"),
            manifest.get("label_words"),
            manifest.get("default_sampling", {}).get("max_tokens"),
            tuple(manifest.get("stop", ())),
        )


@dataclass(frozen=True, slots=True)
class Question:
    """One input for one subject. Fields go to a prompt that has a template; everything else is rendered already."""

    subject: Subject | None
    input: str | Mapping[str, str]


class Backend(Protocol):
    """Answers batches of questions of several subjects; each batch ends before the next begins."""

    batch_size: int
    """Questions that may be asked at once."""

    async def look_up(self, prompt: str) -> Subject:
        """Find a prompt; raises a typed error where there is none."""

    async def classify(self, questions: Sequence[Question], words: Mapping[str, str]) -> list[list[float] | None]:
        """Return the probabilities of the labels' words; None for an input that exceeds the model's length."""

    async def generate(self, questions: Sequence[Question], max_tokens: int, stop: Sequence[str]) -> list[str | None]:
        """Return one greedy continuation each; None for an input that exceeds the model's length."""


async def answers_of_fitting(
    ask: Callable[[Sequence[Question]], Awaitable[Sequence[T]]],
    questions: Sequence[Question],
    too_long: type[Exception],
) -> list[T | None]:
    """Ask in one batch; where that is refused as too long, in halves, until the guilty input stands alone: None."""
    try:
        return list(await ask(questions))
    except too_long:
        if len(questions) == 1:
            return [None]
    half = len(questions) // 2
    first = await answers_of_fitting(ask, questions[:half], too_long)
    return first + await answers_of_fitting(ask, questions[half:], too_long)
