"""Blocks of K/V slots for texts: free list, reference counts, reuse of equal text prefixes. No torch.

A block is `block_size` adjacent slots. Blocks of one row are taken side by side where possible, because the CPU
attends each run of adjacent slots in one call; nothing but speed depends on it.

States of a block: free, reserved (free, but right behind a growing row), used (reference count > 0), cached (count 0,
content still valid and findable; evicted least recently used first, and with one its neighbours that were not used
lately either: one block here and one there would leave every row of a server at work in pieces).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import islice
from typing import Any

_FREE, _RESERVED, _USED, _CACHED = range(4)
_MAX_ROOM = 16
"""Blocks that cached ones make way for before they are needed."""
_NUM_LOOKS = 8
"""Cached blocks whose neighbourhood is looked at for a run."""

PrefixNode = int
"""Identity of a text prefix: a root for each chain of learned prompts, then one node a full block."""


class BlockManager:
    """Owner of every text block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._state = bytearray(num_blocks)
        self._count = [0] * num_blocks
        self._num_allocatable = num_blocks  # free + reserved + cached
        self._cached: OrderedDict[int, int] = OrderedDict()  # block -> when; least recently used first
        self._num_releases = 0
        # Prefixes are compared by value, never by hash alone: (parent node, tokens) -> (node, block).
        self._nodes: dict[tuple[PrefixNode, tuple[int, ...]], tuple[PrefixNode, int]] = {}
        self._node_key: dict[int, tuple[PrefixNode, tuple[int, ...]]] = {}  # block -> its key in _nodes
        self._roots: OrderedDict[Hashable, PrefixNode] = OrderedDict()  # least recently used first
        self._next_node = 0

    @property
    def num_used(self) -> int:
        """Blocks that some row references."""
        return self.num_blocks - self._num_allocatable

    @property
    def num_allocatable(self) -> int:
        """Blocks that can be had by evicting cached ones at most."""
        return self._num_allocatable

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether that many blocks can be had."""
        return num_blocks <= self._num_allocatable

    def allocate(self, num_blocks: int, *, after: int | None = None, expected: int = 0) -> list[int]:
        """Take blocks, following `after` where possible and keeping room for `expected` more behind them.

        The caller has asked `can_allocate`.
        """
        taken: list[int] = []
        while len(taken) < num_blocks:
            nxt = (taken[-1] if taken else after if after is not None else self.num_blocks) + 1
            if nxt < self.num_blocks and self._state[nxt] == _CACHED and self._is_full and self._is_old(nxt):
                self._evict(nxt)
            if nxt >= self.num_blocks or self._state[nxt] > _RESERVED:
                nxt = self._new_run(num_blocks - len(taken), expected)
            self._state[nxt] = _USED
            self._count[nxt] = 1
            taken.append(nxt)
        self._num_allocatable -= num_blocks
        if taken:
            self._reserve(taken[-1] + 1, expected)
        return taken

    def _reserve(self, start: int, length: int) -> None:
        for block in range(start, min(start + length, self.num_blocks)):
            if self._state[block] != _FREE:
                return
            self._state[block] = _RESERVED

    def _new_run(self, needed: int, expected: int) -> int:
        """First block of a free run for all, of one that old cached blocks make way for, or of a shorter one."""
        wanted = needed + expected
        at = self._state.find(bytes(wanted))
        if at < 0 and wanted > 1:
            at = self._cleared_run(needed + min(expected, _MAX_ROOM))
        while at < 0 and wanted > 1:
            wanted //= 2
            at = self._state.find(bytes(wanted))
        if at >= 0:
            return at
        for state in (_FREE, _RESERVED):
            at = self._state.find(bytes([state]))
            if at >= 0:
                return at
        block = next(iter(self._cached))
        self._evict(block)
        return block

    def _cleared_run(self, wanted: int) -> int:
        """First block of a run that is free once old cached blocks are gone; -1 where none has half the length."""
        first, last = 0, 0
        for block in islice(self._cached, _NUM_LOOKS):
            start, end = block, block
            while end - start < wanted and self._can_clear(end):
                end += 1
            while end - start < wanted and self._can_clear(start - 1):
                start -= 1
            if end - start > last - first:
                first, last = start, end
            if last - first == wanted:
                break
        if 2 * (last - first) < wanted:
            return -1
        for block in range(first, last):
            if self._state[block] == _CACHED:
                self._evict(block)
        return first

    def _can_clear(self, block: int) -> bool:
        if not 0 <= block < self.num_blocks:
            return False
        state = self._state[block]
        return state == _FREE or (state == _CACHED and self._is_old(block))

    @property
    def _is_full(self) -> bool:
        """Whether no block is free: nothing is evicted before that."""
        return self._state.find(bytes([_FREE])) < 0

    def _is_old(self, block: int) -> bool:
        """Whether a cached block is of the older half: a beginning that many texts share is not."""
        return 2 * self._cached[block] <= next(iter(self._cached.values())) + self._num_releases

    def _evict(self, block: int) -> None:
        del self._cached[block]
        self._forget(block)
        self._state[block] = _FREE

    def _forget(self, block: int) -> None:
        del self._nodes[self._node_key.pop(block)]

    def forget(self, blocks: Sequence[int]) -> None:
        """Let no later text find these blocks, which the caller still holds: their content is not to be trusted."""
        for block in blocks:
            if block in self._node_key:
                self._forget(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block; the last reference frees it or leaves it cached."""
        for block in reversed(blocks):  # later blocks of a prefix are evicted before earlier ones
            self._count[block] -= 1
            if self._count[block] == 0:
                self._num_allocatable += 1
                if block in self._node_key:
                    self._state[block] = _CACHED
                    self._cached[block] = self._num_releases
                    self._num_releases += 1
                else:
                    self._state[block] = _FREE
        if blocks:
            self._unreserve(blocks[-1] + 1)

    def _unreserve(self, block: int) -> None:
        while block < self.num_blocks and self._state[block] == _RESERVED:
            self._state[block] = _FREE
            block += 1

    # -- reuse of equal text prefixes -------------------------------------------------------------

    def root(self, key: Hashable) -> PrefixNode:
        """The node in front of a text: one for each (salt, versions of the learned prompts).

        More roots than blocks hold nothing: the least recently used is forgotten, its blocks age out unreachable.
        """
        if key not in self._roots:
            if len(self._roots) >= self.num_blocks:
                self._roots.popitem(last=False)
            self._roots[key] = self._new_node()
        self._roots.move_to_end(key)
        return self._roots[key]

    def _new_node(self) -> PrefixNode:
        self._next_node += 1
        return self._next_node

    def match(self, root: PrefixNode, token_ids: Sequence[int]) -> tuple[list[int], PrefixNode]:
        """Reference the longest cached run of full blocks that begins `token_ids`; return (blocks, last node)."""
        node, blocks = root, []
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            found = self._nodes.get((node, tuple(token_ids[start : start + self.block_size])))
            if found is None:
                break
            node, block = found
            if self._count[block] == 0:
                del self._cached[block]
                self._state[block] = _USED
                self._num_allocatable -= 1
            self._count[block] += 1
            blocks.append(block)
        return blocks, node

    def register(self, parent: PrefixNode, token_ids: tuple[int, ...], block: int) -> PrefixNode:
        """Make a full, computed block findable; return its node (the existing one where the text is known already)."""
        key = (parent, token_ids)
        known = self._nodes.get(key)
        if known is not None:
            return known[0]
        if block in self._node_key:  # computed anew: what it held before is gone
            self._forget(block)
        node = self._new_node()
        self._nodes[key] = (node, block)
        self._node_key[block] = key
        return node

    def erase(self, is_wanted: Callable[[Any], bool]) -> list[int]:
        """Forget all texts behind the roots that are wanted; return the blocks that are free by that.

        Blocks in use are found by no later text, and free when their rows end.
        """
        roots = [key for key in self._roots if is_wanted(key)]
        doomed = {self._roots.pop(key) for key in roots}
        freed = []
        for (parent, _), (node, block) in sorted(self._nodes.items(), key=lambda one: one[1][0]):  # parents first
            if parent not in doomed:
                continue
            doomed.add(node)
            self._forget(block)
            if self._state[block] == _CACHED:
                del self._cached[block]
                self._state[block] = _FREE
                freed.append(block)
        return freed

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless every block is in exactly one state and all tables agree."""
        used = sum(1 for count in self._count if count)
        problems = {
            "used": used + self._num_allocatable != self.num_blocks,
            "states": any(
                (state == _USED) != (count > 0) for state, count in zip(self._state, self._count, strict=True)
            ),
            "cached": {b for b in range(self.num_blocks) if self._state[b] == _CACHED} != set(self._cached),
            "nodes": {block for _, block in self._nodes.values()} != set(self._node_key),
            "counts": any(count < 0 for count in self._count),
        }
        broken = [name for name, is_broken in problems.items() if is_broken]
        if broken:
            raise RuntimeError(f"block manager is inconsistent: {', '.join(broken)}")

    def check_references(self, held: Mapping[int, int]) -> None:
        """Raise `RuntimeError` unless reference counts equal what the sequences hold (block -> references)."""
        for block, count in enumerate(self._count):
            if count != held.get(block, 0):
                raise RuntimeError(f"block {block} has {count} references, sequences hold {held.get(block, 0)}")
