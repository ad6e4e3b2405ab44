"""Answers from an engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from promptd_store import PromptArtifact

from promptd.engine.ensemble import softmax
from promptd.engine.request import SamplingParams
from promptd.errors import ContextLengthError
from promptd.evaluation.backend import Question, Subject, answers_of_fitting
from promptd.evaluation.beams import beam_search

if TYPE_CHECKING:
    from promptd.llm import LLM, Prompt


class LLMBackend:
    """Asks a `promptd.LLM`, all questions of a batch in one mixed batch of the engine."""

    def __init__(self, llm: LLM, *, batch_size: int = 128, find: Callable[[str], Prompt] | None = None) -> None:
        """Name prompts by files and folders; `find` may turn other names into prompts."""
        self.batch_size = batch_size
        self._llm = llm
        self._find = find
        self._artifacts: dict[str, PromptArtifact] = {}

    async def look_up(self, prompt: str) -> Subject:
        """Load a file or a PEFT folder."""
        artifact = self._llm.load_prompt(prompt if self._find is None else self._find(prompt))
        self._artifacts[artifact.version] = artifact
        return Subject.of(prompt, artifact.version, artifact.manifest.to_dict())

    async def classify(
        self, questions: Sequence[Question], words: Mapping[str, str] | None
    ) -> list[list[float] | None]:
        """Score the label words, or ask the heads."""

        async def ask(asked: Sequence[Question]) -> list[list[float]]:
            inputs, prompts = [question.input for question in asked], self._prompts(asked)
            if words is None:
                return [softmax(each) for each in self._llm.pool(inputs, "classes", prompts)]
            return [softmax(each) for each in self._llm.score(inputs, list(words.values()), prompts)]

        return await answers_of_fitting(ask, questions, ContextLengthError)

    async def generate(
        self, questions: Sequence[Question], max_tokens: int, stop: Sequence[str], num_beams: int
    ) -> list[str | None]:
        """Continue greedily, or by beam search."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=tuple(stop))

        async def ask(asked: Sequence[Question]) -> list[str]:
            inputs, prompts = [question.input for question in asked], self._prompts(asked)
            if num_beams == 1:
                return [each.text for each in self._llm.generate(inputs, prompts, params)]
            found = beam_search(self._llm, inputs, prompts, num_beams=num_beams, max_tokens=max_tokens)
            return [_until(self._llm.model.decode(tokens), stop) for tokens in found]

        return await answers_of_fitting(ask, questions, ContextLengthError)

    def _prompts(self, questions: Sequence[Question]) -> list[PromptArtifact | None]:
        subjects = [question.subject for question in questions]
        return [None if subject is None else self._artifacts[subject.version] for subject in subjects]


def _until(text: str, stop: Sequence[str]) -> str:
    """Return what stands before the first stop string."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]
