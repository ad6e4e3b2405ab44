"""Slots for learned prompts: exact sizes, no rounding to blocks. No torch."""

from __future__ import annotations

import bisect

Span = tuple[int, int]


class ExtentAllocator:
    """Hands out runs of adjacent slots in `[first, first + num_slots)`; a request may get several runs."""

    def __init__(self, first: int, num_slots: int) -> None:
        self.first = first
        self.num_slots = num_slots
        self._free: list[Span] = [(first, num_slots)] if num_slots else []  # sorted by start, never adjacent
        self.num_free = num_slots

    def allocate(self, num_slots: int) -> tuple[Span, ...]:
        """Take the smallest single run that fits `num_slots`, else the largest runs. The caller checked `num_free`."""
        fitting = [span for span in self._free if span[1] >= num_slots]
        taken: list[Span] = []
        left = num_slots
        while left:
            start, length = min(fitting, key=lambda span: span[1]) if fitting else max(self._free, key=lambda s: s[1])
            take = min(left, length)
            at = self._free.index((start, length))
            self._free[at : at + 1] = [(start + take, length - take)] if length > take else []
            taken.append((start, take))
            left -= take
        self.num_free -= num_slots
        return tuple(taken)

    def release(self, spans: tuple[Span, ...]) -> None:
        """Give runs back and join them with their free neighbours."""
        for start, length in spans:
            at = bisect.bisect(self._free, (start, length))
            if at < len(self._free) and start + length == self._free[at][0]:
                length += self._free.pop(at)[1]
            if at and sum(self._free[at - 1]) == start:
                start, before = self._free.pop(at - 1)
                length, at = length + before, at - 1
            self._free.insert(at, (start, length))
        self.num_free += sum(length for _, length in spans)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless the free runs are sorted, apart and add up."""
        ends = [self.first - 1]
        for start, length in self._free:
            if start <= ends[-1] or length < 1:
                raise RuntimeError(f"free extents overlap or touch at slot {start}")
            ends.append(start + length)
        if ends[-1] > self.first + self.num_slots or sum(length for _, length in self._free) != self.num_free:
            raise RuntimeError("free extents do not add up")
