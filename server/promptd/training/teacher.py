"""The teacher of a job that distills: the same model with a text, or a stored prompt, in its context.

Its context is keys and values, computed once a job. What it is asked are rows: to those without a target it writes one,
drawn from its own distribution by the job's seed, and of all of them it tells its likeliest tokens, once. Both run as
shares of the passes that training runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from promptd_store import PromptArtifact

from promptd.errors import InvalidRequestError, NumericalError
from promptd.modeling import FrozenModel
from promptd.training.context import chain_context
from promptd.training.data import TrainingDataError
from promptd.training.distill_config import DistillConfig
from promptd.training.distill_objective import LogitsReader, NextTokens, TopLogits
from promptd.training.encoding import Encoded, evaluation_batches
from promptd.training.passes import MAX_SHARE_TOKENS, Share, Shares

MAX_TEACHER_BYTES = 256 << 20
"""What a job may keep of its teacher's distributions."""


class Teacher:
    """Asked once by one job. `writes_rows`: whether the rows are its own, or only their answers."""

    def __init__(
        self,
        model: FrozenModel,
        config: DistillConfig,
        chain: Sequence[PromptArtifact],
        *,
        writes_rows: bool,
        seed: int,
    ) -> None:
        self._model = model
        self._config = config
        self._versions = [artifact.version for artifact in chain]
        self._context = chain_context(model, chain)
        self._takes_bos = model.takes_special_tokens(chain)
        self._writes_rows = writes_rows
        self._seed = seed

    @property
    def num_tokens(self) -> int:
        """Keys of its context."""
        return self._context.num_tokens

    @property
    def max_written(self) -> int:
        """Tokens that it writes at most behind a row without a target."""
        return self._config.row_tokens if self._writes_rows else self._config.answer_tokens

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded about it, as plain JSON values: its text by its digest alone."""
        settings = {name: value for name, value in asdict(self._config).items() if name not in ("text", "prompt")}
        return {"teacher": self._versions, "writes_rows": self._writes_rows, **settings}

    def digest(self, of_rows: str) -> str:
        """Return the digest of all that is learned from: the rows, and who is asked about them."""
        facts = json.dumps([of_rows, self.facts], sort_keys=True)
        return f"sha256:{hashlib.sha256(facts.encode()).hexdigest()}"

    def checked(self, rows: Sequence[Encoded], num_before: int) -> list[Encoded]:
        """Return the rows as they will be asked: ones that keep their own tokens have them as the target.

        `num_before` tokens stand before them where the student reads them. Raises `TrainingDataError` for a row that
        gets too long and `InvalidRequestError` where the answers would take too much memory.
        """
        if not self.max_written:
            rows = [row if row.target_ids else _compared(row) for row in rows]
        limit, before = self._model.spec.max_model_len, max(num_before, self.num_tokens)
        num_targets = 0
        for row in rows:
            written = len(row.target_ids) or self.max_written
            num_targets += written
            if before + row.length(written) > limit:
                raise TrainingDataError(
                    row.example.line,
                    f"{before} tokens before it + {row.num_input} input tokens + {written} target tokens "
                    f"exceed the model's length of {limit}",
                )
        needed = TopLogits.num_bytes(num_targets, self._top_k)
        if needed > MAX_TEACHER_BYTES:
            raise InvalidRequestError(
                f"distill: the teacher's {self._top_k} likeliest tokens at {num_targets} places take {needed} bytes, "
                f"{MAX_TEACHER_BYTES} are allowed: fewer rows, fewer answer_tokens or a smaller top_k",
                param="distill.top_k",
            )
        return list(rows)

    def complete(self, rows: Sequence[Encoded]) -> Shares[list[Encoded]]:
        """Return all rows with targets and the teacher's distributions there. Raises `NumericalError`."""
        rows = list(rows)
        num_before = self.num_tokens + self.max_written
        batches = evaluation_batches([row.num_input for row in rows], MAX_SHARE_TOKENS, num_before)
        for batch in batches:
            written = yield from self._write([(index, rows[index]) for index in batch if not rows[index].target_ids])
            for index, target_ids in written.items():
                rows[index] = replace(rows[index], target_ids=target_ids)
        for batch in evaluation_batches([row.num_tokens for row in rows], MAX_SHARE_TOKENS, self.num_tokens):
            asked = [self._as_read(rows[index]) for index in batch]
            reader = LogitsReader(lambda logits: TopLogits.of(logits, self._top_k))
            yield from self._ask(reader, asked)
            for index, row in zip(batch, asked, strict=True):
                rows[index] = replace(rows[index], teacher=reader.of(row))
        return rows

    @property
    def _top_k(self) -> int:
        return min(self._config.top_k, self._model.spec.vocab_size)

    def _write(self, drafts: Sequence[tuple[int, Encoded]]) -> Shares[dict[int, tuple[int, ...]]]:
        """Draw a target for each row, token by token; a row's draws depend on its number and the seed alone."""
        ends = self._model.eos_token_ids
        written: dict[int, tuple[int, ...]] = {index: () for index, _ in drafts}
        draws = {index: self._draws(index) for index in written}
        # What is new of each row, one target behind it: its logits are those of the next token.
        new = {index: replace(self._as_read(row), target_ids=(0,)) for index, row in drafts}
        begun: dict[int, torch.Tensor] = {}
        for place in range(self.max_written):
            if not new:
                break
            reader = NextTokens(begun)
            yield from self._ask(reader, list(new.values()))
            begun, read, new = {}, new, {}
            for index, row in read.items():
                token = _drawn(reader.of(row), draws[index][place])
                written[index] += (token,)
                if token in ends:
                    continue
                if row.source_ids:  # read again with all that is written: what it goes on from depends on its source
                    new[index] = replace(row, text_ids=(*row.text_ids, token))
                else:
                    new[index] = replace(row, text_ids=(token,))
                    begun[id(new[index])] = reader.keys_of(row)
        return written

    def _draws(self, index: int) -> list[float]:
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{index}".encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        draws: list[float] = torch.rand(self.max_written, generator=generator, dtype=torch.float64).tolist()
        return draws

    def _as_read(self, row: Encoded) -> Encoded:
        """Return the row without BOS where that stands in front of the teacher's text already."""
        if (
            not self._takes_bos
            and not row.source_ids
            and row.text_ids[0] == self._model.bos_token_id
            and len(row.text_ids) > 1
        ):
            return replace(row, text_ids=row.text_ids[1:])
        return replace(row)

    def _ask(self, reader: LogitsReader[Any], rows: Sequence[Encoded]) -> Shares[None]:
        yield Share(reader, rows, None, context=self._context)


def _compared(row: Encoded) -> Encoded:
    if len(row.text_ids) < 2:
        raise TrainingDataError(row.example.line, "has one token: there is none behind it to compare")
    return replace(row, text_ids=row.text_ids[:1], target_ids=row.text_ids[1:])


def _drawn(cumulated: torch.Tensor, draw: float) -> int:
    """Return the token at a place between 0 and 1 of `[vocab_size]` cumulated probabilities."""
    total = cumulated[-1].item()
    if not total > 0:  # also where it is not a number
        raise NumericalError("the teacher's logits are not finite")
    return min(int(torch.searchsorted(cumulated, draw * total, right=True)), len(cumulated) - 1)
