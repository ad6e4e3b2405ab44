"""What a row asks of the model, and what the answer is worth: to the loss that trains and to the scores it is told by.

Completions: the language-model loss of the target tokens; the input has none.

Labels: the cross-entropy over the label words' log-probabilities (a softmax over the labels alone), plus a small
share of the language-model loss of the right word. The first part is what classification by label words asks for;
with the second alone, a small model spends most of its steps on learning that the next word is a label at all (measured
on the demo model, 150 steps on Snips: 24 % instead of 55 % of the rows right). The small share makes the word what
free generation gives, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from promptd_store import BaseModelSpec, PromptKind
from torch.nn.functional import cross_entropy

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training.encoding import Encoded, TaskFormat, label_word_ids, reads_words
from promptd.training.forward import PromptedTexts
from promptd.training.methods.headed import split

LANGUAGE_MODEL_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over some rows, so that parts of a batch add up to the batch whatever the parts are."""

    loss: torch.Tensor
    """What training minimizes, summed over terms; scalar float32, with autograd to the prompt."""
    num_terms: int
    nll: float
    """Negative log-likelihood of the right targets in nats."""
    num_target_tokens: int
    num_rows: int
    num_right: int
    """Rows whose label has the best-scored word; 0 for completions."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.loss + other.loss,
            self.num_terms + other.num_terms,
            self.nll + other.nll,
            self.num_target_tokens + other.num_target_tokens,
            self.num_rows + other.num_rows,
            self.num_right + other.num_right,
        )


class Objective(ABC):
    """One task's way to read logits."""

    has_labels: bool = False
    num_classes: int = 0
    """Classes of a head that is learned beside the prompt; 0 for none."""
    num_target_tokens: int = 0
    """Rows of a soft prompt, its last, that stand in front of targets."""
    wants_keys: bool = False
    """Whether `keep` is called, where a text's keys do not depend on a source."""

    @abstractmethod
    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return what must run through the model for these rows."""

    @abstractmethod
    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """Read the logits of `texts`, `[num_logits, vocab_size]` in float32."""

    def keep(self, rows: Sequence[Encoded], key_values: torch.Tensor) -> None:  # noqa: B027 - most need none
        """Take the keys and values of the texts, `[num_layers, 2, num_kv_heads, num_tokens, head_dim]`."""

    @abstractmethod
    def num_tokens(self, row: Encoded) -> int:
        """Return how many tokens a row runs through the model."""

    @abstractmethod
    def num_terms(self, rows: Sequence[Encoded]) -> int:
        """Return by how much a batch's summed loss is divided: known before it runs."""


class CompletionObjective(Objective):
    """The mean loss over target tokens."""

    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return each row's text and all but the last of its target tokens."""
        index: list[int] = []
        start = 0
        for row in rows:
            first = start + len(row.text_ids) - 1
            index.extend(range(first, first + len(row.target_ids)))
            start += len(row.input_ids)
        texts, sources = [row.input_ids for row in rows], [row.source_ids for row in rows]
        return PromptedTexts(prompt, texts, torch.tensor(index), sources=sources)

    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """Sum the loss of the target tokens."""
        targets = torch.tensor([token for row in rows for token in row.target_ids], device=logits.device)
        loss = cross_entropy(logits, targets, reduction="sum")
        return Tally(loss, len(targets), loss.item(), len(targets), len(rows), 0)

    def num_tokens(self, row: Encoded) -> int:
        """The row's own tokens."""
        return row.num_tokens

    def num_terms(self, rows: Sequence[Encoded]) -> int:
        """One term a target token."""
        return sum(len(row.target_ids) for row in rows)


class LabelObjective(Objective):
    """Cross-entropy over the labels' words; candidates that differ only in their last token share one text."""

    has_labels = True

    def __init__(self, words: Mapping[str, tuple[int, ...]]) -> None:
        self._index = {label: at for at, label in enumerate(words)}
        self._stems: dict[tuple[int, ...], list[int]] = {}  # all but a word's last token -> the words' last tokens
        order = []
        for stem in sorted({word[:-1] for word in words.values()}):
            members = [at for at, word in enumerate(words.values()) if word[:-1] == stem]
            self._stems[stem] = [list(words.values())[at][-1] for at in members]
            order += members
        self._columns = torch.tensor(order).argsort()  # label -> its column when stems come one after another

    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return every row's text once for each stem of the words; its source, where it has one, once."""
        found = self.continuations([row.text_ids for row in rows], prompt)
        return replace(found, sources=[row.source_ids for row in rows])

    def continuations(self, texts: Sequence[tuple[int, ...]], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return what must run for `scores`."""
        inputs: list[tuple[int, ...]] = []
        index: list[int] = []
        end = 0
        for stem in self._stems:
            for text in texts:
                inputs.append(text + stem)
                end += len(inputs[-1])
                index += range(end - 1 - len(stem), end)  # before each token of the stem, and after the last
        return PromptedTexts(prompt, inputs, torch.tensor(index))

    def scores(self, num_texts: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the summed log-probability of every label's word after every text, `[num_texts, num_labels]`."""
        log_probs, start, parts = logits.log_softmax(-1), 0, []
        for stem, lasts in self._stems.items():
            steps = len(stem) + 1
            part = log_probs[start : start + num_texts * steps].unflatten(0, (num_texts, steps))
            start += num_texts * steps
            ids = torch.tensor(stem, dtype=torch.int64, device=logits.device).expand(num_texts, -1)
            inner = part[:, :-1].gather(2, ids.unsqueeze(2)).sum((1, 2))  # [num_texts]
            parts.append(inner.unsqueeze(1) + part[:, -1, lasts])
        return torch.cat(parts, 1)[:, self._columns.to(logits.device)]

    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """Sum the loss of the rows' labels."""
        scores = self.scores(len(rows), logits)
        truth = torch.tensor([self._index[row.example.label or ""] for row in rows], device=logits.device)
        right = scores.gather(1, truth.unsqueeze(1))
        loss = cross_entropy(scores, truth, reduction="sum") - LANGUAGE_MODEL_SHARE * right.sum()
        num_right = int((scores.argmax(1) == truth).sum().item())
        num_target_tokens = sum(len(row.target_ids) for row in rows)
        return Tally(loss, len(rows), -right.double().sum().item(), num_target_tokens, len(rows), num_right)

    def num_tokens(self, row: Encoded) -> int:
        """The row's text once for each stem, and its source."""
        return len(row.source_ids) + sum(len(row.text_ids) + len(stem) for stem in self._stems)

    def num_terms(self, rows: Sequence[Encoded]) -> int:
        """One term a row."""
        return len(rows)


class MaskObjective(LabelObjective):
    """Cross-entropy over the labels' words where a text has its mask; each word is one token."""

    def __init__(self, words: Mapping[str, tuple[int, ...]], mask_token_id: int) -> None:
        super().__init__(words)
        self._mask = mask_token_id

    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return each row's source, and where the mask is in it."""
        sources, places, start = [row.source_ids for row in rows], [], 0
        for source in sources:
            places.append(start + source.index(self._mask))
            start += len(source)
        return PromptedTexts(prompt, (), torch.tensor(places), sources=sources)

    def num_tokens(self, row: Encoded) -> int:
        """The row's own tokens."""
        return len(row.source_ids)


class ClassObjective(Objective):
    """Cross-entropy over the classes of a head that is learned beside the prompt."""

    has_labels = True

    def __init__(self, labels: Sequence[str], kind: PromptKind, spec: BaseModelSpec) -> None:
        self._index = {label: at for at, label in enumerate(labels)}
        self.num_classes = len(labels)
        self._kind, self._spec = kind, spec

    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return each row's source, under prompt and head as one flat tensor."""
        sources, index = [row.source_ids for row in rows], torch.arange(len(rows))
        if prompt is None:  # the bare model has no head: one that tells nothing apart
            return PromptedTexts(None, (), index, sources=sources, head=torch.zeros(1, self._spec.hidden_size + 1))
        own, head = split(prompt, self._kind, self.num_classes, self._spec)
        return PromptedTexts(own, (), index, sources=sources, head=head)

    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """Sum the loss of the rows' labels; the bare model, which has no head, tells all classes alike."""
        truth = torch.tensor([self._index[row.example.label or ""] for row in rows], device=logits.device)
        scores = logits.expand(-1, self.num_classes)
        loss = cross_entropy(scores, truth, reduction="sum")
        num_right = int((scores.argmax(1) == truth).sum().item())
        return Tally(loss, len(rows), loss.item(), len(rows), len(rows), num_right)

    def num_tokens(self, row: Encoded) -> int:
        """The row's own tokens."""
        return len(row.source_ids)

    def num_terms(self, rows: Sequence[Encoded]) -> int:
        """One term a row."""
        return len(rows)


def objective_for(model: FrozenModel, task: TaskFormat, kind: PromptKind = PromptKind.SOFT) -> Objective:
    """Return the objective that a task's rows ask for: by its labels where it has some.

    Raises `InvalidRequestError` for rows with completions where the model writes nothing.
    """
    if model.reads_whole and not task.label_words:
        raise InvalidRequestError(
            "this base model writes no completions: its rows need a label each", param="training_file"
        )
    if model.reads_whole and not reads_words(model, task):
        return ClassObjective(tuple(task.label_words or ()), kind, model.spec)
    words = label_word_ids(model, task)
    if model.reads_whole:
        return MaskObjective(words, model.tokenizer.mask_token_id)
    return LabelObjective(words) if words else CompletionObjective()
