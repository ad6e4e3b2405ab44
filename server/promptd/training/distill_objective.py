"""Distillation: the divergence of the model behind a learned prompt from the model behind its teacher's context.

KL(teacher || student) at every place of the target, over k + 1 outcomes: the teacher's k likeliest tokens, and all
others together. That is never negative, 0 only where the student agrees with all of them, never more than the KL over
the whole vocabulary (merging outcomes cannot add divergence), and equal to it for k = vocabulary. Context distillation:
Askell et al. 2021 (arXiv 2112.00861), Snell et al. 2022 (2209.15189); into a prefix: Eyuboglu et al. 2025 (Cartridges,
2506.06266).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import torch

from promptd.training.encoding import Encoded
from promptd.training.forward import PromptedTexts
from promptd.training.objectives import CompletionObjective, Tally

T = TypeVar("T")
NOTHING = -1e4
"""Log-probability of what never happens: finite, so that nothing times it is nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class TopLogits:
    """A teacher's distribution at each place of a target, on the CPU."""

    token_ids: torch.Tensor
    """`[num_targets, k]`, int32."""
    log_probs: torch.Tensor
    """`[num_targets, k]`, float32, in nats."""
    log_rest: torch.Tensor
    """`[num_targets]`, float32: of all other tokens together."""

    @classmethod
    def of(cls, logits: torch.Tensor, k: int) -> Self:
        """Keep the k largest of `[num_targets, vocab_size]`, or all where there are no more."""
        log_probs = logits.log_softmax(-1)
        found = log_probs.topk(min(k, logits.shape[1]), dim=-1)
        rest = _log_rest(log_probs, found.indices).clamp_min(NOTHING)
        return cls(found.indices.int().cpu(), found.values.cpu(), rest.cpu())

    @staticmethod
    def num_bytes(num_targets: int, k: int) -> int:
        """Memory of so many places."""
        return num_targets * (8 * k + 4)


class DistillObjective(CompletionObjective):
    """The mean divergence from the teacher, in nats per target token; rows must have been shown to it."""

    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """Sum the divergence at the target tokens."""
        teachers = [row.teacher for row in rows if row.teacher is not None]
        ids, wanted, rest = (
            torch.cat(parts).to(logits.device)
            for parts in (
                [one.token_ids for one in teachers],
                [one.log_probs for one in teachers],
                [one.log_rest for one in teachers],
            )
        )
        log_probs = logits.log_softmax(-1)
        ids = ids.long()
        loss = (wanted.exp() * (wanted - log_probs.gather(1, ids))).sum()
        if ids.shape[1] < logits.shape[1]:
            loss = loss + (rest.exp() * (rest - _log_rest(log_probs, ids))).sum()
        num_targets = len(ids)
        return Tally(loss, num_targets, loss.item(), num_targets, len(rows), 0)


class LogitsReader(CompletionObjective, Generic[T]):
    """Not an objective to learn by: keeps what `read` makes of each row's logits, `[num_targets, vocab_size]`."""

    def __init__(self, read: Callable[[torch.Tensor], T]) -> None:
        self._read = read
        self._found: dict[int, T] = {}

    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """Read the logits; a pass that is run again reads the same again."""
        for row, own in zip(rows, logits.split([len(row.target_ids) for row in rows]), strict=True):
            self._found[id(row)] = self._read(own)
        return Tally(logits.new_zeros(()), len(logits), 0.0, len(logits), len(rows), 0)

    def of(self, row: Encoded) -> T:
        """What was read of this very row."""
        return self._found[id(row)]


class NextTokens(LogitsReader[torch.Tensor]):
    """Reads each row's distribution of the next token, cumulated, and keeps its keys: the row goes on from them.

    A row is what is new: its text behind nothing, or one token behind its own beginning.
    """

    wants_keys = True

    def __init__(self, begun: Mapping[int, torch.Tensor]) -> None:
        """`begun`: by the `id` of each row, the keys and values of its beginning; empty where all rows begin."""
        super().__init__(lambda logits: logits[0].double().softmax(-1).cumsum(-1).cpu())
        self._begun = begun
        self._keys: dict[int, torch.Tensor] = {}

    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """Return the rows behind their beginnings."""
        return replace(super().texts(rows, prompt), begun=[self._begun[id(row)] for row in rows] if self._begun else ())

    def keep(self, rows: Sequence[Encoded], key_values: torch.Tensor) -> None:
        """Take the rows' new keys and values."""
        for row, own in zip(rows, key_values.split([row.num_tokens for row in rows], dim=3), strict=True):
            self._keys[id(row)] = own

    def keys_of(self, row: Encoded) -> torch.Tensor:
        """The keys and values of all of the row so far."""
        begun = self._begun.get(id(row))
        own = self._keys[id(row)]
        return own if begun is None else torch.cat([begun, own], dim=3)


def _log_rest(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of everything but these, `[num_targets]`."""
    return log_probs.scatter(1, ids, float("-inf")).logsumexp(1)
