"""Learned prompts on the device, as K/V: shared, read-only, under a byte budget.

An entry is one element of a chain. Its key is (salt, versions from the chain's beginning to here), so a thousand
user prompts behind one task prompt share the task's K/V, and no two versions ever share a key. Public prompts at a
chain's beginning lie under one salt for everybody; what continues them lies under the caller's. Soft prompts and texts
become K/V in the next packed batch, in front of the rows that wait for them; a prefix is copied in at once.
Entries in use are pinned; the others leave least recently used first, longest chain first: those of salts that were not
used for a while, then those of the salt that holds most. So one caller that goes through thousands of prompts evicts
its own, and alone it has the whole cache.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from promptd_store import PromptKind

from promptd.engine.extents import ExtentAllocator
from promptd.engine.prompt_entry import ChainKey, PromptEntry, Segment
from promptd.modeling import Arrangement, FrozenModel, KVPool

PUBLIC_SALT = "public"
"""No caller's own salt."""
ACTIVE_SECONDS = 60.0
"""A salt that was not used for so long has no claim to room any more."""


@dataclass
class PromptCacheStats:
    """Counters since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class PromptCache:
    """Owner of the prompt region of the K/V pool."""

    def __init__(self, pool: KVPool, extents: ExtentAllocator, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._extents = extents
        self._clock = clock
        self._entries: dict[ChainKey, PromptEntry] = {}
        self._by_salt: dict[str, OrderedDict[ChainKey, PromptEntry]] = {}  # least recently used first
        self._used_at: OrderedDict[str, float] = OrderedDict()  # salts that hold entries, least recently used first
        self._held: Counter[str] = Counter()  # slots by salt
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

    def bytes_of(self, version: str, salts: Collection[str]) -> int:
        """Bytes of K/V of a version under some salts, in whatever chains it stands."""
        found = (entry for key, entry in self._entries.items() if key[-1] == version and key[0] in salts)
        return sum(entry.num_slots for entry in found) * self._pool.bytes_per_slot

    def acquire(self, salt: str, segments: Sequence[Segment], max_bytes: int | None = None) -> list[PromptEntry] | None:
        """Pin the chain, making what is missing; None where pinned entries leave no room for it now.

        What lies under the caller's own salt never exceeds `max_bytes`: its own idle entries leave for it.
        """
        max_slots = None if max_bytes is None else max_bytes // self._pool.bytes_per_slot
        chain: list[PromptEntry] = []
        versions: tuple[str, ...] = ()
        num_misses = 0
        for segment in segments:
            versions = (*versions, segment.version)
            key = (PUBLIC_SALT if segment.is_public else salt, *versions)
            entry = self._entries.get(key)
            if entry is None:
                own_limit = None if key[0] == PUBLIC_SALT else max_slots
                entry = self._create(key, segment, chain[-1] if chain else None, own_limit)
                num_misses += 1
            if entry is None:
                self.release(chain)
                return None
            self._touch(key)
            entry.num_pins += 1
            chain.append(entry)
        self.stats.misses += num_misses
        self.stats.hits += len(segments) - num_misses
        return chain

    def release(self, chain: Sequence[PromptEntry]) -> None:
        """Unpin a chain; an entry that nobody waits for any more is not computed."""
        for entry in reversed(chain):
            entry.num_pins -= 1
            if not entry.num_pins and (entry.is_erased or not entry.is_whole):
                self.discard(entry)

    def discard(self, entry: PromptEntry) -> None:
        """Drop an unpinned entry whose K/V is incomplete or not to be trusted, unless others build on it."""
        if not entry.num_pins and not entry.num_children and self._entries.get(entry.key) is entry:
            self._remove(entry)

    def erase(self, is_wanted: Callable[[ChainKey], bool]) -> int:
        """Drop, overwritten, the entries that are wanted with all that builds on them; return how many.

        What running rows need goes when the last of them ends.
        """
        found = [entry for key, entry in self._entries.items() if is_wanted(key)]
        for entry in sorted(found, key=lambda one: len(one.key), reverse=True):  # what builds on another first
            entry.is_erased = True
            self.discard(entry)
        return len(found)

    def finish_loading(self) -> None:
        """Forget finished loads; called once a step."""
        for entry in self._loading:
            if entry.is_ready:
                entry.drop_tensors()
        self._loading = [entry for entry in self._loading if not entry.is_ready]

    def _create(
        self, key: ChainKey, segment: Segment, parent: PromptEntry | None, max_slots: int | None
    ) -> PromptEntry | None:
        if parent is not None:
            parent.num_pins += 1  # must not be evicted to make room for its own child
        room = self._keep_within(key[0], segment.num_slots, max_slots) and self._make_room(
            key[0], segment.num_slots, parent
        )
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
        self._by_salt.setdefault(key[0], OrderedDict())[key] = entry
        self._held[key[0]] += entry.num_slots
        return entry

    def _touch(self, key: ChainKey) -> None:
        self._by_salt[key[0]].move_to_end(key)
        self._used_at[key[0]] = self._clock()
        self._used_at.move_to_end(key[0])

    def _keep_within(self, salt: str, num_slots: int, max_slots: int | None) -> bool:
        """Evict a salt's own idle entries until so many more are within its limit."""
        while max_slots is not None and self._held[salt] + num_slots > max_slots:
            victim = self._idle_entry(salt) if salt in self._by_salt else None
            if victim is None:
                return False
            self._remove(victim)
            self.stats.evictions += 1
        return True

    def _make_room(self, salt: str, num_slots: int, parent: PromptEntry | None) -> bool:
        while self._extents.num_free < num_slots:
            victim = self._victim(salt, num_slots, parent)
            if victim is None:
                return False
            self._remove(victim)
            self.stats.evictions += 1
        return True

    def _victim(self, salt: str, num_slots: int, parent: PromptEntry | None) -> PromptEntry | None:
        """Choose what leaves for an entry of `salt`; None: wait until something is unpinned."""
        oldest_active = self._clock() - ACTIVE_SECONDS
        for idle, used_at in self._used_at.items():
            if used_at >= oldest_active:
                break
            victim = self._idle_entry(idle)
            if victim is not None:
                return victim
        wanted = self._held[salt] + num_slots
        holders = sorted(self._by_salt, key=lambda one: wanted if one == salt else self._held[one], reverse=True)
        for holder in holders:
            # From a smaller holder only what one's own rows, once they end, could not free.
            if holder != salt and self._held[holder] < wanted and self._has_pins(salt, parent):
                return None
            victim = self._idle_entry(holder)
            if victim is not None:
                return victim
        return None

    def _idle_entry(self, salt: str) -> PromptEntry | None:
        """Return the least recently used entry of a salt that nobody needs."""
        entries = self._by_salt[salt].values()
        return next((entry for entry in entries if not entry.num_pins and not entry.num_children), None)

    def _has_pins(self, salt: str, parent: PromptEntry | None) -> bool:
        """Return whether rows other than the one that asks hold entries of a salt."""
        own = set()
        while parent is not None:
            own.add(parent.key)
            parent = parent.parent
        return any(entry.num_pins > (key in own) for key, entry in self._by_salt.get(salt, {}).items())

    def _remove(self, entry: PromptEntry) -> None:
        salt = entry.key[0]
        del self._entries[entry.key], self._by_salt[salt][entry.key]
        self._held[salt] -= entry.num_slots
        if not self._by_salt[salt]:
            del self._by_salt[salt], self._used_at[salt], self._held[salt]
        for spans in entry.banks.values():
            if entry.is_erased:
                self._pool.clear(spans)
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
        held = sum(entry.num_slots for entry in self._entries.values())
        if held + self._extents.num_free != self._extents.num_slots or held != self._held.total():
            raise RuntimeError("prompt entries and free slots do not add up")
        if any(entry.num_children != children.get(entry.key, 0) for entry in self._entries.values()):
            raise RuntimeError("prompt entries disagree about their children")
        by_salt = {key for entries in self._by_salt.values() for key in entries}
        if by_salt != set(self._entries) or set(self._used_at) != set(self._by_salt):
            raise RuntimeError("prompt entries and their salts do not agree")


def make_segments(arranged: Arrangement, model: FrozenModel) -> tuple[Segment, ...]:
    """Turn the cached artifacts of a request into the elements of a chain, public ones marked."""
    segments: list[Segment] = []
    if arranged.bos_token_id is not None:
        segments.append(Segment("bos", 1, 1, token_ids=(arranged.bos_token_id,), is_public=arranged.num_public > 0))
    for number, artifact in enumerate(arranged.cached):
        is_public = number < arranged.num_public
        if artifact.kind is PromptKind.TEXT:
            ids = model.text_ids.of(artifact.manifest.text or "")
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
