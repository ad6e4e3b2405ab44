"""A server at work, whose blocks are all used or cached: rows lie in one piece, and what many texts share stays."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from promptd.engine.block_manager import BlockManager

SIZE, SHARED = 4, 3
"""Tokens of a block; blocks of the beginning that every text has."""


def work(blocks: BlockManager, num_rows: int) -> tuple[float, int]:
    """Run rows of 6 to 10 blocks, four at a time; return the pieces of a row, and how many shared blocks were lost."""
    rng, root = random.Random(3), blocks.root("key")
    begin = tuple(range(SHARED * SIZE))
    running: list[list[int]] = []
    pieces, lost = 0, 0
    for number in range(num_rows):
        found, node = blocks.match(root, begin)
        lost += SHARED - len(found) if number else 0
        length = rng.randint(6, 10)
        own = blocks.allocate(length // 2, expected=length - length // 2)
        while len(own) < length:
            own += blocks.allocate(1, after=own[-1], expected=length - len(own) - 1)
        row = found + own
        for at, block in enumerate(own, len(found)):
            tokens = begin[at * SIZE : at * SIZE + SIZE] if at < SHARED else (number, at, 0, 0)
            node = blocks.register(node, tokens, block)
        if number >= num_rows // 2:
            pieces += 1 + sum(second != first + 1 for first, second in pairwise(own))
        running.append(row)
        blocks.check_integrity()
        if len(running) == 4:
            blocks.release(running.pop(rng.randrange(4)))
            blocks.check_integrity()
    return pieces / (num_rows - num_rows // 2), lost


def test_rows_stay_in_one_piece_when_the_cache_is_full() -> None:
    """Fewer than two pieces a row, and the shared beginning is found each time."""
    pieces, lost = work(BlockManager(80, SIZE), 200)
    assert pieces < 2 and lost == 0


def test_control_one_block_at_a_time_leaves_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicting the least recently used block alone scatters rows over the pool."""
    monkeypatch.setattr(BlockManager, "_cleared_run", lambda self, wanted: -1)
    monkeypatch.setattr(BlockManager, "_is_old", lambda self, block: False)
    pieces, lost = work(BlockManager(80, SIZE), 200)
    assert pieces > 3 and lost == 0
