"""One request of a tenant, from its headers to its end: what it may take, what it took, what it gives back."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from promptd.errors import AuthenticationError
from promptd.tenancy.budget import Budget, ServerBudgets
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.limits import NO_LIMITS, TenantLimits
from promptd.tenancy.places import PlacePool, Places
from promptd.tenancy.rates import RateMeter, RateReading, rate_headers
from promptd.tenancy.scopes import Principal
from promptd.tenancy.slots import SlotPool
from promptd.tenancy.usage import Counts, UsageLedger

Meter = Callable[[], tuple[str, Counts]]
"""Asked once, when the request has ended: the prompt, and what was served under it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request's headers say that it will take of the server."""

    is_inference: bool = False
    num_tokens: int = 0
    """At a guess; what it is found to take once it is read counts then."""
    upload_bytes: int = 0


class Visit:
    """A request that was let in. What it takes is given back or written down when it leaves, whatever happens."""

    limits: TenantLimits = NO_LIMITS
    """The tenant's own."""

    def __init__(self, gate: Gate, principal: Principal) -> None:
        self.principal = principal
        self._gate = gate
        self._meters: list[Meter] = []
        self._mentioned: set[str] = set()
        self._num_reserved = 0
        self._held = Counter[Budget]()
        """What it has of the server's."""
        self._num_open_tokens = 0
        self._tokens: RateReading | None = None
        self._requests: RateReading | None = None
        self._has_slot = False

    def claim(self, claim: Claim) -> None:
        """Take what the headers tell of the server's budgets; raises `OverloadedError`."""
        budgets = self._gate.budgets
        self._hold(budgets.requests, int(claim.is_inference))
        self._hold(budgets.upload_bytes, claim.upload_bytes)
        self._hold(budgets.tokens, claim.num_tokens)

    def hold_bytes(self, count: int) -> None:
        """Take what a file on its way out will hold of the server's memory; raises `OverloadedError`."""
        budget = self._gate.budgets.upload_bytes
        self._hold(budget, min(count, budget.most_for_one))

    def hold_stream(self) -> None:
        """Take one of the server's streams of events; raises `OverloadedError`."""
        self._hold(self._gate.budgets.event_streams, 1)

    def hold_tokens(self, count: int) -> None:
        """Take what a part of the request will really use of the server's tokens; raises `OverloadedError`."""
        budget = self._gate.budgets.tokens
        self._hold(budget, max(0, self._num_open_tokens + count - self._held[budget]))  # else it was claimed already
        self._num_open_tokens += count

    def free_tokens(self, count: int) -> None:
        """Let a part of the request that has ended make room for the next one."""
        self._num_open_tokens -= count

    async def enter(self, *, is_inference: bool) -> None:
        """Take a request of the tenant's own limits and, for inference, a slot; raises `RateLimitError`."""
        tenant, limits = self.principal.tenant, self.limits
        if limits.requests_per_minute is not None:
            self._requests = await self._gate.rates.take(tenant, "requests", limits.requests_per_minute, 1)
        if is_inference and limits.max_concurrent_requests is not None:
            await self._gate.slots.enter(tenant, limits.max_concurrent_requests)
            self._has_slot = True

    @property
    def places(self) -> Places | None:
        """Where its parts may wait in the engine; None where there is no limit."""
        limit = self.limits.max_queued_requests
        return None if limit is None else self._gate.places.of(self.principal.tenant, limit)

    async def reserve_tokens(self, count: int) -> None:
        """Take the most tokens that a part of the request can use of the tenant's own; raises `RateLimitError`."""
        limit = self.limits.tokens_per_minute
        if limit is not None:
            reading = await self._gate.rates.take(self.principal.tenant, "tokens", limit, count)
            if self._tokens is None or self._tokens.minute != reading.minute:
                self._num_reserved = 0  # of a minute that is over nothing is given back
            self._tokens = reading
            self._num_reserved += count

    def watch(self, meter: Meter) -> None:
        """Have something counted at the end."""
        self._meters.append(meter)

    def mention(self, prompts: Iterable[str]) -> None:
        """Note that prompts were of use, whatever the request comes to."""
        self._mentioned.update(prompts)

    def headers(self) -> Mapping[str, str]:
        """Return what OpenAI's clients read of the limits; empty where there are none."""
        found: dict[str, str] = {}
        for kind, reading in (("requests", self._requests), ("tokens", self._tokens)):
            if reading is not None:
                found |= rate_headers(kind, self._gate.rates.reading(self.principal.tenant, kind, reading.limit))
        return found

    def leave(self) -> None:
        """Give back, write down. Called once, at the very end."""
        tenant = self.principal.tenant
        for budget, count in self._held.items():
            budget.give_back(tenant, count)
        if self._has_slot:
            self._gate.slots.leave(tenant)
        for prompt in self._mentioned:
            self._gate.usage.add(tenant, self.principal.key_id, prompt, Counts())
        num_used = 0
        for number, meter in enumerate(self._meters):
            prompt, counts = meter()
            counts += Counts(requests=1 if number == 0 else 0)
            self._gate.usage.add(tenant, self.principal.key_id, prompt, counts)
            num_used += counts.prompt_tokens + counts.completion_tokens
        if self._tokens is not None and self._num_reserved > num_used:
            self._gate.rates.give_back(tenant, "tokens", self._num_reserved - num_used, self._tokens.minute)

    def _hold(self, budget: Budget, count: int) -> None:
        if count:
            budget.take(self.principal.tenant, count)
            self._held[budget] += count


class Gate:
    """Lets requests in."""

    def __init__(
        self,
        directory: TenantDirectory,
        budgets: ServerBudgets,
        rates: RateMeter,
        slots: SlotPool,
        places: PlacePool,
        usage: UsageLedger,
    ) -> None:
        self.budgets = budgets
        self.rates = rates
        self.slots = slots
        self.places = places
        self.usage = usage
        self._directory = directory

    async def enter(self, principal: Principal, claim: Claim) -> Visit:
        """Open a visit; raises `OverloadedError` where the server, `RateLimitError` where the tenant has no more."""
        visit = Visit(self, principal)
        try:
            visit.claim(claim)  # first, and without a look into the store: a flood must not cost a thing
            # How long a key is good while the store is away was looked at before; limits are for as long as it is.
            tenant = await self._directory.tenant(principal.tenant, max_outage_seconds=math.inf)
            if tenant.erased_at is not None:  # a key of the environment outlives its tenant
                raise AuthenticationError("this API key is not known")
            visit.limits = tenant.limits
            await visit.enter(is_inference=claim.is_inference)
        except BaseException:
            visit.leave()
            raise
        return visit

    async def close(self) -> None:
        """Write the last counts and give the slots back."""
        await self.usage.close()
        await self.slots.settle()
        await self.places.close()

    async def keep(self) -> None:
        """Do what has to be done again and again, until cancelled."""
        await asyncio.gather(self.slots.keep(), self.places.keep(), self.usage.keep())
