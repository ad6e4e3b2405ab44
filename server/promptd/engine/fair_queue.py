"""Who is next: waiting sequences by share, and how much service each share has had. No torch.

A share is whose work a request is; the engine knows nothing of it but its key and its weight. Service is counted in
virtual tokens as in the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
arXiv 2401.00588): a token that is read counts 1, one that is written counts 2, both divided by the share's weight, when
they are scheduled. The share with the least service is served first. One that comes back from idleness is lifted
to the least of those that are busy: nobody saves service up. Nothing is ever held back while somebody wants it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from promptd.engine.sequence import Sequence
from promptd.engine.share import Places

READ_COST, WRITE_COST = 1.0, 2.0
"""Of one token, as in the paper."""
MAX_IDLE_ACCOUNTS = 10_000


@dataclass(frozen=True, slots=True)
class ShareReading:
    """A share that has work now, and its service so far in weighted tokens."""

    key: str
    weight: float
    num_running: int
    num_waiting: int
    service: float


@dataclass(slots=True)
class _Account:
    """One share: its service so far and its open sequences."""

    weight: float
    service: float
    places: Places | None = None
    num_open: int = 0
    num_running: int = 0
    num_waiting: int = 0
    lines: dict[int, deque[Sequence]] = field(default_factory=dict)  # by priority; empty ones are dropped

    def first(self) -> Sequence | None:
        return self.lines[max(self.lines)][0] if self.lines else None


class FairQueue:
    """Owner of the waiting sequences and of every share's service."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._busy: dict[str, _Account] = {}  # those that have work: a step looks at no others
        self._num_waiting = 0
        self._floor = 0.0
        """The least service of a busy share, now or when the last one was busy."""

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Yield waiting sequences, each share's in its own order."""
        for account in self._busy.values():
            for priority in sorted(account.lines, reverse=True):
                yield from account.lines[priority]

    def open(self, seq: Sequence) -> None:
        """Take in a new sequence, at the end of its line."""
        share = seq.request.share
        account = self._accounts.get(share.key)
        if account is None:
            account = self._accounts[share.key] = _Account(share.weight, self._floor)
        account.weight = share.weight
        if share.places is not None or not account.num_open:
            account.places = share.places
        if not account.num_open:
            account.service = max(account.service, self._least_busy())
            self._busy[share.key] = account
        account.num_open += 1
        self._put(account, seq, is_first=False)

    def close(self, seq: Sequence) -> None:
        """Forget a sequence that has ended and is in no line."""
        key = seq.request.share.key
        account = self._accounts[key]
        account.num_open -= 1
        if not account.num_open:
            del self._busy[key]
            if not self._busy:
                self._floor = max(self._floor, account.service)
            if account.service <= self._floor or len(self._accounts) > MAX_IDLE_ACCOUNTS:
                del self._accounts[key]  # it would be lifted anyway

    def put_back(self, seq: Sequence) -> None:
        """Put a sequence that ran at the head of its line again."""
        account = self._accounts[seq.request.share.key]
        account.num_running -= 1
        self._put(account, seq, is_first=True)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out of its line."""
        account = self._accounts[seq.request.share.key]
        line = account.lines[seq.request.priority]
        line.remove(seq)
        if not line:
            del account.lines[seq.request.priority]
        account.num_waiting -= 1
        self._num_waiting -= 1

    def start(self, seq: Sequence) -> None:
        """Take a sequence out of its line, because it runs from now on."""
        self.remove(seq)
        self._accounts[seq.request.share.key].num_running += 1

    def stop(self, seq: Sequence) -> None:
        """Count one less that runs."""
        self._accounts[seq.request.share.key].num_running -= 1

    def charge(self, seq: Sequence, *, num_read: int = 0, num_written: int = 0) -> None:
        """Count tokens that are scheduled for a sequence."""
        account = self._accounts[seq.request.share.key]
        account.service += (READ_COST * num_read + WRITE_COST * num_written) / account.weight

    def first(self, key: str) -> Sequence | None:
        """Return the sequence of a share that is next: of the highest priority the oldest."""
        return self._accounts[key].first()

    @property
    def num_busy(self) -> int:
        """Shares that have work here; may be read from any thread, as `is_busy` and `num_waiting`."""
        return len(self._busy)

    def is_busy(self, key: str) -> bool:
        """Return whether a share has work here."""
        return key in self._busy

    def num_waiting(self, key: str) -> int:
        """Return how many sequences of a share wait."""
        account = self._accounts.get(key)
        return 0 if account is None else account.num_waiting

    def least_served(self, keys: Iterable[str]) -> str | None:
        """Return the share of these with the least service."""
        return min(keys, key=lambda key: self._accounts[key].service, default=None)

    def service(self, key: str) -> float:
        """Return a share's service, in weighted tokens."""
        account = self._accounts.get(key)
        return self._floor if account is None else account.service

    def waiting_shares(self) -> list[str]:
        """Return the shares that have a line."""
        return [key for key, account in self._busy.items() if account.num_waiting]

    def num_running(self, key: str) -> int:
        """Return how many sequences of a share run."""
        return self._accounts[key].num_running

    def readings(self) -> list[ShareReading]:
        """Return the shares that have work; may be asked from any thread, and is as of about now."""
        return [
            ShareReading(key, account.weight, account.num_running, account.num_waiting, account.service)
            for key, account in self._busy.copy().items()
        ]

    def parts(self, total: int) -> dict[str, int]:
        """Divide `total` among the shares that have work, by weight; at least 1 for each."""
        whole = sum(account.weight for account in self._busy.values())
        return {key: max(1, int(total * account.weight / whole)) for key, account in self._busy.items()}

    def longest_line(self) -> Sequence | None:
        """Return what gives way where too many wait: in the longest line, by weight, the last to be served."""
        waiting = (account for account in self._busy.values() if account.num_waiting)
        account = max(waiting, key=lambda one: one.num_waiting / one.weight, default=None)
        return None if account is None else account.lines[min(account.lines)][-1]

    def surplus(self) -> list[tuple[Sequence, int]]:
        """Return what waits without a place of its share, the last to be served first, and how many places there are.

        Rows that ran stay, and so does what was put there without a thought of places.
        """
        found = []
        for account in self._busy.values():
            if account.places is None or not account.num_waiting:
                continue
            num_over = account.places.surplus(account.num_waiting)
            if num_over:
                line = [seq for priority in sorted(account.lines) for seq in reversed(account.lines[priority])]
                fresh = [seq for seq in line if seq.scheduled is None and seq.request.share.places is not None]
                found += [(seq, account.places.limit) for seq in fresh[:num_over]]
        return found

    def _put(self, account: _Account, seq: Sequence, *, is_first: bool) -> None:
        line = account.lines.setdefault(seq.request.priority, deque())
        if is_first:
            line.appendleft(seq)
        else:
            line.append(seq)
        account.num_waiting += 1
        self._num_waiting += 1

    def _least_busy(self) -> float:
        busy = (account.service for account in self._busy.values())
        self._floor = max(self._floor, min(busy, default=self._floor))
        return self._floor
