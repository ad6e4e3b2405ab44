"""What the whole server takes at a time: open requests, their tokens, bytes of files on their way in or out.

Looked at and taken in one step without an `await`, so that no burst gets past a limit. A tenant may hold no more than
`ALPHA` times what is still free (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Trans. on Networking 6(2), 1998). So
one that floods alone holds 4/5 of a budget and leaves a fifth to whoever comes; of two that flood, each ends at 4/9.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from promptd.errors import InvalidRequestError, OverloadedError

ALPHA = 4
MAX_EVENT_STREAMS = 256


@dataclass(frozen=True, slots=True)
class BudgetReading:
    """How much of a budget is in use, and who holds some of it."""

    used: int
    limit: int
    num_tenants: int


class Budget:
    """A number of things that tenants hold for a while. All methods run on one event loop."""

    def __init__(self, what: str, limit: int, *, param: str | None = None) -> None:
        """`what` is the plural that messages name; `param` the field of a request that asks for too many."""
        self.limit = limit
        self._what = what
        self._param = param
        self._held = Counter[str]()
        self._used = 0

    @property
    def most_for_one(self) -> int:
        """What one tenant gets of an otherwise unused budget: at least one thing."""
        return max(1, self.limit * ALPHA // (ALPHA + 1))

    def take(self, tenant: str, count: int) -> None:
        """Hold `count` more; raises `OverloadedError`, or `InvalidRequestError` where it could never be had."""
        if count > self.most_for_one:
            raise InvalidRequestError(
                f"{count} {self._what} at once are more than the {self.most_for_one} that this server gives to one",
                param=self._param,
                code="too_much_at_once",
            )
        if not self.has_room(tenant, count):
            raise self.refusal()
        self._held[tenant] += count
        self._used += count

    def has_room(self, tenant: str, count: int) -> bool:
        """Whether a tenant may hold `count` more."""
        free, held = self.limit - self._used - count, self._held[tenant]
        return free >= 0 and (not held or held + count <= ALPHA * free)

    @property
    def has_room_for_all(self) -> bool:
        """Whether even one who held all that is held might hold one more: then nobody needs to be asked who he is."""
        return self._used + 1 <= ALPHA * (self.limit - self._used - 1)

    def refusal(self) -> OverloadedError:
        """Return what one hears for whom there is no room."""
        return OverloadedError(f"the server has {self._used} {self._what} open and takes {self.limit} in all")

    def give_back(self, tenant: str, count: int) -> None:
        """Hold `count` less."""
        self._used -= count
        self._held[tenant] -= count
        if not self._held[tenant]:
            del self._held[tenant]

    def reading(self) -> BudgetReading:
        """Return the present state."""
        return BudgetReading(self._used, self.limit, len(self._held))


@dataclass(frozen=True, slots=True)
class ServerBudgets:
    """All that this server gives out, whoever asks."""

    requests: Budget
    tokens: Budget
    upload_bytes: Budget
    event_streams: Budget
    """Readers of jobs' events: each looks at its log again and again, for as long as it likes."""

    @classmethod
    def of(
        cls,
        *,
        max_waiting_or_running: int,
        max_model_len: int,
        max_open_requests: int | None = None,
        max_open_tokens: int | None = None,
        max_open_upload_bytes: int,
    ) -> ServerBudgets:
        """Make the budgets; without a choice, one tenant alone may fill the engine's rows and its queue."""
        requests = max_open_requests or math.ceil(max_waiting_or_running * (ALPHA + 1) / ALPHA)
        tokens = max_open_tokens or requests * max_model_len
        return cls(
            Budget("requests", requests),
            Budget("tokens", tokens, param="max_tokens"),
            Budget("bytes of files", max_open_upload_bytes, param="body"),
            Budget("streams of events", MAX_EVENT_STREAMS),
        )
