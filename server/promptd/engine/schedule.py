"""One step as it was planned. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from promptd.engine.sequence import Sequence


@dataclass(slots=True)
class Budget:
    """Tokens that a step may still read. What can be cut is cut to `num_even`, what cannot be cut to `num_tokens`."""

    num_tokens: int
    num_even: int
    """So many, and those who write meanwhile do not notice."""

    def take(self, num_tokens: int) -> None:
        """Give tokens away."""
        self.num_tokens -= num_tokens
        self.num_even -= num_tokens


@dataclass(slots=True)
class ScheduledLoad:
    """Part of a prompt that becomes K/V in this step."""

    entry: Any
    start: int
    num_tokens: int


@dataclass(slots=True)
class ScheduledRow:
    """Tokens of one sequence that run in this step."""

    seq: Sequence
    start: int
    num_tokens: int
    candidate_blocks: list[int] = field(default_factory=list)
    is_final: bool = field(init=False)
    """Whether the sequence's last token is among them, so that its logits are wanted."""

    def __post_init__(self) -> None:
        self.is_final = self.start + self.num_tokens == len(self.seq.token_ids)


@dataclass(slots=True)
class Schedule:
    """One step. Its sources are read first: the rows may read what they leave."""

    loads: list[ScheduledLoad] = field(default_factory=list)
    sources: list[Sequence] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)

    def completes(self, entry: Any) -> bool:
        """Whether an element of a chain and all before it have their K/V once the loads of this step ran."""
        ends = {id(load.entry): load.start + load.num_tokens for load in self.loads}
        while entry is not None:
            if not entry.is_ready and ends.get(id(entry)) != entry.num_tokens:
                return False
            entry = entry.parent
        return True

    def __bool__(self) -> bool:
        return bool(self.loads or self.sources or self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that run, but for candidates'."""
        parts = [load.num_tokens for load in self.loads] + [row.num_tokens for row in self.rows]
        return sum(parts) + sum(len(seq.source.token_ids) for seq in self.sources)
