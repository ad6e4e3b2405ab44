"""Whoever reads held-out rows: the frozen model behind a prompt, or a model with weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from promptd_store import PromptArtifact

from promptd.engine.request import SamplingParams
from promptd.evaluation.metrics import bleu
from promptd.llm import LLM
from promptd.modeling import FrozenModel
from promptd.training import Encoded, Objective, Scores, evaluate
from promptd.training.objectives import Tally
from tests.bench.experiments.descent import measure
from tests.bench.experiments.weights import WeightTuning

MAX_ANSWER_TOKENS = 64
STOP = "\n"


class Reader(Protocol):
    """Answers for one learner."""

    def scores(self, objective: Objective, rows: Sequence[Encoded]) -> Scores:
        """Measure rows."""

    def answers(self, texts: Sequence[Sequence[int]], max_tokens: int) -> list[str] | None:
        """Continue texts greedily to the line's end; None where this reader cannot."""


@dataclass(frozen=True)
class PromptReader:
    """The frozen model behind a prompt, as promptd serves it; `lead` is a text in front instead."""

    llm: LLM
    prompt: torch.Tensor | None
    artifact: PromptArtifact | None = None
    lead: Sequence[int] = ()

    def scores(self, objective: Objective, rows: Sequence[Encoded]) -> Scores:
        """Measure rows. A text in front is a soft prompt of its tokens' embeddings: it runs once for all rows."""
        prompt = self.prompt
        if self.lead:
            prompt = self.llm.model.embed(torch.tensor(self.lead)).float()
        return evaluate(self.llm.model, prompt, rows, objective)

    def answers(self, texts: Sequence[Sequence[int]], max_tokens: int) -> list[str] | None:
        """Ask the serving engine."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=(STOP,))
        inputs = [[*self.lead, *text] for text in texts]
        return [made.text for made in self.llm.generate(inputs, [self.artifact] * len(texts), params)]


@dataclass(frozen=True)
class WeightReader:
    """A model with weights of its own."""

    tuning: WeightTuning
    model: FrozenModel

    def scores(self, objective: Objective, rows: Sequence[Encoded]) -> Scores:
        """Measure rows."""
        tallies = measure(objective, rows, lambda part: self.tuning.tally(objective, part))
        return Scores.of(tallies, has_labels=objective.has_labels)

    def answers(self, texts: Sequence[Sequence[int]], max_tokens: int) -> list[str] | None:
        """Ask transformers."""
        newline = self.model.encode(STOP, add_special_tokens=False)
        has_newline = self.model.decode(newline) == STOP  # T5 has none
        stops = [*self.model.eos_token_ids, *(newline if has_newline else ())]
        made = self.tuning.plain.generate(texts, max_tokens, stops)
        return [self.model.decode(ids).split(STOP)[0] for ids in made]


@dataclass(frozen=True)
class TallyReader:
    """Anything that measures rows and generates nothing."""

    tally: Callable[[Sequence[Encoded]], Tally]

    def scores(self, objective: Objective, rows: Sequence[Encoded]) -> Scores:
        """Measure rows."""
        return Scores.of(measure(objective, rows, self.tally), has_labels=objective.has_labels)

    def answers(self, texts: Sequence[Sequence[int]], max_tokens: int) -> list[str] | None:
        """There are none."""
        return None


def examined(reader: Reader, objective: Objective, rows: Sequence[Encoded], *, generates: bool) -> dict[str, Any]:
    """Return the scores on rows as JSON values; BLEU over all references of each input where texts are generated."""
    found = reader.scores(objective, rows).to_json()
    if generates:
        references: dict[tuple[int, ...], list[str]] = {}
        for row in rows:
            references.setdefault(row.text_ids, []).append((row.example.completion or "").strip())
        answers = reader.answers(list(references), MAX_ANSWER_TOKENS)
        if answers is not None:
            found["bleu"] = round(bleu([answer.strip() for answer in answers], list(references.values())), 2)
    return found
