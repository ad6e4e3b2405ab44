"""Learned prompts on the device, as K/V: shared, read-only, under a byte budget.

An entry is one element of a chain. Its key is (salt, versions from the chain's beginning to here), so a thousand
user prompts behind one task prompt share the task's K/V, and no two versions ever share a key. Public prompts at a
chain's beginning lie under one salt for everybody; what continues them lies under the caller's. Soft prompts and texts
become K/V in the next packed batch, in front of the rows that wait for them; a prefix is copied in at once.
Entries in use are pinned; the others leave least recently used first, longest chain first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from promptd_store import PromptKind

from promptd.engine.extents import ExtentAllocator
from promptd.modeling import Arrangement, FrozenModel, KVPool, Span

PUBLIC_SALT = "public"
"""No caller's own salt."""
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

    def drop_tensors(self) -> None:
        """Forget what the K/V was made from: a resident prompt costs its K/V and nothing beside it."""
        self.segment = replace(self.segment, embeds=None, prefix={}, token_ids=())

    @property
    def next_position(self) -> int:
        """Position of whatever follows this element."""
        return self.first_position + self.segment.num_positions


@dataclass
class PromptCacheStats:
    """Counters since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class PromptCache:
    """Owner of the prompt region of the K/V pool."""

    def __init__(self, pool: KVPool, extents: ExtentAllocator) -> None:
        self._pool = pool
        self._extents = extents
        self._entries: OrderedDict[ChainKey, PromptEntry] = OrderedDict()  # least recently used first
        self._loading: list[PromptEntry] = []
        self.stats = PromptCacheStats()

    @property
    def num_bytes(self) -> int:
        """Bytes of K/V that entries hold."""
        return (self._extents.num_slots - self._extents.num_free) * self._pool.bytes_per_slot

    @property
    def num_resident(self) -> int:
        """Number of entries."""
        return len(self._entries)

    @property
    def capacity_tokens(self) -> int:
        """Virtual tokens that fit at most."""
        return self._extents.num_slots

    @property
    def loading(self) -> Sequence[PromptEntry]:
        """Entries whose K/V is not complete yet, parents before children."""
        return self._loading

    def acquire(self, salt: str, segments: Sequence[Segment]) -> list[PromptEntry] | None:
        """Pin the chain, making what is missing; None where pinned entries leave no room for it now."""
        chain: list[PromptEntry] = []
        versions: tuple[str, ...] = ()
        num_misses = 0
        for segment in segments:
            versions = (*versions, segment.version)
            key = (PUBLIC_SALT if segment.is_public else salt, *versions)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._create(key, segment, chain[-1] if chain else None)
                num_misses += 1
            if entry is None:
                self.release(chain)
                return None
            self._entries.move_to_end(key)
            entry.num_pins += 1
            chain.append(entry)
        self.stats.misses += num_misses
        self.stats.hits += len(segments) - num_misses
        return chain

    def release(self, chain: Sequence[PromptEntry]) -> None:
        """Unpin a chain; an entry that nobody waits for any more is not computed."""
        for entry in reversed(chain):
            entry.num_pins -= 1
            if not entry.num_pins and not entry.is_whole:
                self.discard(entry)

    def discard(self, entry: PromptEntry) -> None:
        """Drop an unpinned entry whose K/V is incomplete or not to be trusted, unless others build on it."""
        if not entry.num_pins and not entry.num_children and self._entries.get(entry.key) is entry:
            self._remove(entry)

    def finish_loading(self) -> None:
        """Forget finished loads; called once a step."""
        for entry in self._loading:
            if entry.is_ready:
                entry.drop_tensors()
        self._loading = [entry for entry in self._loading if not entry.is_ready]

    def _create(self, key: ChainKey, segment: Segment, parent: PromptEntry | None) -> PromptEntry | None:
        if parent is not None:
            parent.num_pins += 1  # must not be evicted to make room for its own child
        room = self._make_room(segment.num_slots)
        if parent is not None:
            parent.num_pins -= 1
        if not room:
            return None
        first = parent.next_position if parent is not None else 0
        names = list(segment.prefix) or ["target"]
        banks = {name: self._extents.allocate(segment.num_tokens) for name in names}
        entry = PromptEntry(key, segment, banks, parent, first)
        entry.slots = [slot for start, length in entry.spans for slot in range(start, start + length)]
        if parent is not None:
            parent.num_children += 1
        if segment.prefix:
            for name, prefix in segment.prefix.items():
                self._pool.load_prefix(banks[name], prefix)
            entry.num_computed = segment.num_tokens
            entry.drop_tensors()
        else:
            self._loading.append(entry)
        self._entries[key] = entry
        return entry

    def _make_room(self, num_tokens: int) -> bool:
        while self._extents.num_free < num_tokens:
            victim = next((e for e in self._entries.values() if not e.num_pins and not e.num_children), None)
            if victim is None:
                return False
            self._remove(victim)
            self.stats.evictions += 1
        return True

    def _remove(self, entry: PromptEntry) -> None:
        del self._entries[entry.key]
        for spans in entry.banks.values():
            self._extents.release(spans)
        if entry.parent is not None:
            entry.parent.num_children -= 1
        if not entry.is_ready:
            self._loading = [other for other in self._loading if other is not entry]

    def check_pins(self, held: Mapping[ChainKey, int]) -> None:
        """Raise `RuntimeError` unless pins equal what the sequences hold (key -> pins)."""
        for key, entry in self._entries.items():
            if entry.num_pins != held.get(key, 0):
                raise RuntimeError(f"prompt entry {key} has {entry.num_pins} pins, sequences hold {held.get(key, 0)}")

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless entries, slots, pins and children agree."""
        self._extents.check_integrity()
        children: dict[ChainKey, int] = {}
        for entry in self._entries.values():
            if entry.parent is not None:
                children[entry.parent.key] = children.get(entry.parent.key, 0) + 1
                if self._entries.get(entry.parent.key) is not entry.parent:
                    raise RuntimeError(f"prompt entry {entry.key} outlived its parent")
        held = sum(entry.num_tokens * len(entry.banks) for entry in self._entries.values())
        if held + self._extents.num_free != self._extents.num_slots:
            raise RuntimeError("prompt entries and free slots do not add up")
        if any(entry.num_children != children.get(entry.key, 0) for entry in self._entries.values()):
            raise RuntimeError("prompt entries disagree about their children")


def make_segments(arranged: Arrangement, model: FrozenModel) -> tuple[Segment, ...]:
    """Turn the cached artifacts of a request into the elements of a chain, public ones marked."""
    segments: list[Segment] = []
    if arranged.bos_token_id is not None:
        segments.append(Segment("bos", 1, 1, token_ids=(arranged.bos_token_id,), is_public=arranged.num_public > 0))
    for number, artifact in enumerate(arranged.cached):
        is_public = number < arranged.num_public
        if artifact.kind is PromptKind.TEXT:
            ids = tuple(model.encode(artifact.manifest.text or "", add_special_tokens=False))
            segments.append(Segment(artifact.version, len(ids), len(ids), token_ids=ids, is_public=is_public))
        elif artifact.kind is PromptKind.SOFT:
            embeds = artifact.tensors["prompt_embeddings"]
            count = embeds.shape[0]
            segments.append(Segment(artifact.version, count, count, embeds=embeds, is_public=is_public))
        else:
            prefix = artifact.tensors["prefix"]
            moved = prefix.shape[3] if artifact.manifest.position_convention == "shifted" else 0
            banks = model.split_prefix(prefix)
            segments.append(Segment(artifact.version, prefix.shape[3], moved, prefix=banks, is_public=is_public))
    return tuple(segments)
