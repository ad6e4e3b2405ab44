"""The server's budgets: never more than there is, nothing lost, and room for whoever comes next."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptd.errors import InvalidRequestError, OverloadedError
from promptd.tenancy import Budget, ServerBudgets


def fill(budget: Budget, tenant: str) -> int:
    """Take one after the other until there is no more; return how many."""
    for count in range(budget.limit + 1):
        try:
            budget.take(tenant, 1)
        except OverloadedError:
            return count
    raise AssertionError("it took more than its limit")


def test_a_flood_leaves_room() -> None:
    """One that floods holds 4/5; who comes next finds room, and gets what the first one gives back before it does."""
    budget = Budget("requests", 100)
    assert fill(budget, "first") == 80
    assert fill(budget, "second") == 16
    assert fill(budget, "third") == 3
    for _ in range(36):  # one by one: the second is the first to have one again
        budget.give_back("first", 1)
        assert fill(budget, "first") == 0
        assert fill(budget, "second") <= 1
    held = {tenant: budget._held[tenant] for tenant in ("first", "second", "third")}
    assert held["first"] == 44 and 35 <= held["second"] <= 44, held
    assert budget.reading().used <= 100


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_small_budgets(limit: int) -> None:
    """Also of very few things a lone tenant gets at least one, and no more than there are."""
    budget = Budget("requests", limit)
    assert 1 <= fill(budget, "one") <= limit
    assert budget.reading().used <= limit


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.booleans()), max_size=60),
)
def test_never_more_than_the_limit(limit: int, steps: list[tuple[str, int, bool]]) -> None:
    """Whatever is taken and given back by whom: at most the limit is out, and what is out is what was taken."""
    budget, held = Budget("tokens", limit, param="max_tokens"), Counter[str]()
    for tenant, count, is_taken in steps:
        if is_taken:
            try:
                budget.take(tenant, count)
            except (OverloadedError, InvalidRequestError):
                continue
            held[tenant] += count
        elif held[tenant]:
            budget.give_back(tenant, held.pop(tenant))
        assert budget.reading().used == held.total() <= limit
        if budget.has_room_for_all:
            assert all(budget.has_room(tenant, 1) for tenant in "abcd")


def test_what_can_never_be_had_is_told_apart() -> None:
    """Waiting does not help a request that is larger than the budget: 400, not 503."""
    budget = Budget("tokens", 100, param="max_tokens")
    with pytest.raises(InvalidRequestError) as never:
        budget.take("one", 81)
    assert (never.value.code, never.value.param) == ("too_much_at_once", "max_tokens")
    budget.take("one", 80)
    with pytest.raises(OverloadedError):
        budget.take("two", 21)
    budget.take("two", 20)


def test_defaults_let_one_tenant_fill_the_engine() -> None:
    """Rows and queue of the engine can be filled by one tenant, each with the longest row."""
    budgets = ServerBudgets.of(max_waiting_or_running=272, max_model_len=2048, max_open_upload_bytes=1)
    assert fill(budgets.requests, "one") == 272
    budgets.tokens.take("one", 272 * 2048)
