"""Who answers: an engine in this process, a running server, or the server's own engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from promptd.errors import InvalidRequestError

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
    labels: tuple[str, ...] | None = None
    """The classes of the head that came with it."""

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
            tuple(manifest["labels"]) if manifest.get("labels") else None,
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

    async def classify(
        self, questions: Sequence[Question], words: Mapping[str, str] | None
    ) -> list[list[float] | None]:
        """Return the probabilities of the labels' words, or of the classes of the prompts' own heads where there are
        none; None for an input that exceeds the model's length."""

    async def generate(
        self, questions: Sequence[Question], max_tokens: int, stop: Sequence[str], num_beams: int
    ) -> list[str | None]:
        """Return one continuation each, greedy or by beam search; None for an input that exceeds the model's length.

        Raises `InvalidRequestError` where there is no beam search.
        """


def check_greedy(num_beams: int) -> None:
    """Raise `InvalidRequestError` for a beam search over a server, which would ask it for every token of every beam."""
    if num_beams != 1:
        raise InvalidRequestError(
            f"num_beams must be 1 over a server, got {num_beams}: beam search takes the model in this process",
            param="num_beams",
        )


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
