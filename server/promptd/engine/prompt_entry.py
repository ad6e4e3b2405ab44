"""An element of a chain of prompts: what it is made of, and where it is resident."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from promptd.modeling import Span

ChainKey = tuple[str, ...]
"""`(salt, version, version, …)`."""


@dataclass(frozen=True)
class Segment:
    """One element of a chain, ready for the device: input embeddings, a prefix, or text."""

    version: str
    num_tokens: int
    num_positions: int
    """How far the element moves the positions of what follows (0 for an unshifted prefix)."""
    embeds: torch.Tensor | None = None  # [num_tokens, hidden_size]
    prefix: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Bank -> `[num_layers, 2, num_kv_heads, num_tokens, head_dim]`; all else is a target's."""
    token_ids: tuple[int, ...] = ()
    is_public: bool = False
    """Whether this and all before it may be shared by everybody."""

    @property
    def num_slots(self) -> int:
        """Slots of keys and values that it takes."""
        return self.num_tokens * max(1, len(self.prefix))


@dataclass(eq=False)
class PromptEntry:
    """One resident element of a chain."""

    key: ChainKey
    segment: Segment
    banks: dict[str, tuple[Span, ...]]
    """Bank -> where its keys and values are."""
    parent: PromptEntry | None
    first_position: int
    num_computed: int = 0
    num_pins: int = 0
    num_children: int = 0
    slots: list[int] = field(default_factory=list)
    is_erased: bool = False
    """Whether it goes as soon as nobody needs it, its slots overwritten."""

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return self.segment.num_tokens

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where the keys and values are that a target reads in front of itself."""
        return self.banks.get("target", ())

    @property
    def is_ready(self) -> bool:
        """Whether all of its keys and values are stored."""
        return self.num_computed == self.num_tokens

    @property
    def is_whole(self) -> bool:
        """Whether this element and all before it are ready (a prefix is, at once, even where its parent is not)."""
        return self.is_ready and (self.parent is None or self.parent.is_whole)

    @property
    def num_slots(self) -> int:
        """Slots in all banks."""
        return self.num_tokens * len(self.banks)

    def drop_tensors(self) -> None:
        """Forget what the K/V was made from: a resident prompt costs its K/V and nothing beside it."""
        self.segment = replace(self.segment, embeds=None, prefix={}, token_ids=())

    @property
    def next_position(self) -> int:
        """Position of whatever follows this element."""
        return self.first_position + self.segment.num_positions
