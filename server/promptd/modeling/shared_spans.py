"""Which neighbours begin with the same keys (a prompt, a text that many continue): these are read once for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]
"""`(first slot, number of slots)`: a run of adjacent slots."""
Spans = Sequence[Span]
_LONG = 256
"""Keys of a span that is worth a product of its own."""


@dataclass(slots=True)
class Run:
    """Adjacent rows `[first, first + num_rows)` whose first `num_shared` keys are the same; alone a row shares none."""

    first: int
    num_rows: int = 1
    num_shared: int = 0

    @property
    def end(self) -> int:
        """The row behind the last one."""
        return self.first + self.num_rows


def num_keys(spans: Spans) -> int:
    """Return how many keys lie in some spans."""
    return sum(length for _, length in spans)


def num_common(one: Spans, other: Spans) -> int:
    """Return how many keys two rows begin with in common, however these are cut into spans that begin alike."""
    count = 0
    for (start, length), (other_start, other_length) in zip(one, other, strict=False):
        if start != other_start:
            break
        count += min(length, other_length)
        if length != other_length:
            break
    return count


def runs_of(rows: Iterable[Spans]) -> list[Run]:
    """Put neighbours together so that keys are read seldom: greedily, each row where it saves the most."""
    runs: list[Run] = []
    before: Spans = ()
    shared_before = 0  # by the last run, until its last row joined
    for at, spans in enumerate(rows):
        common, last = num_common(before, spans), runs[-1] if runs else Run(0, 0)
        before = spans
        shared = min(last.num_shared, common) if last.num_rows > 1 else common
        joined = last.num_rows * shared
        apart = (last.num_rows - 1) * last.num_shared
        parted = (last.num_rows - 2) * last.num_shared + common  # the row before comes along
        if joined and joined >= max(apart, parted):
            shared_before = last.num_shared
            last.num_rows, last.num_shared = last.num_rows + 1, shared
        elif parted > apart and last.num_rows > 1:
            last.num_rows, last.num_shared = last.num_rows - 1, shared_before
            shared_before = 0
            runs.append(Run(at - 1, 2, common))
        else:
            runs.append(Run(at))
    return runs


def first_keys(spans: Spans, num_keys: int) -> list[Span]:
    """Return the spans of the first `num_keys` keys."""
    found = []
    for start, length in spans:
        if num_keys <= 0:
            break
        found.append((start, min(length, num_keys)))
        num_keys -= length
    return found


def behind_keys(spans: Spans, num_keys: int) -> list[Span]:
    """Return the spans behind the first `num_keys` keys."""
    found = []
    for start, length in spans:
        skipped = min(length, num_keys)
        num_keys -= skipped
        if skipped < length:
            found.append((start + skipped, length - skipped))
    return found


def pieces_of(spans: Spans) -> list[list[Span]]:
    """Cut a row's keys into what is read at once: long spans alone, and short ones that follow one another together."""
    pieces: list[list[Span]] = []
    for span in spans:
        if pieces and max(span[1], pieces[-1][-1][1]) < _LONG:
            pieces[-1].append(span)
        else:
            pieces.append([span])
    return pieces
