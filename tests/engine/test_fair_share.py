"""Shares get their parts, alone everything, and a flood of one delays the others by next to nothing.

Service is counted here from what the engine runs, step by step, apart from the scheduler's own counters.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from promptd_store import encode

from promptd.engine.engine import Engine
from promptd.engine.prompt_cache import ACTIVE_SECONDS
from promptd.engine.request import GenerateRequest, RequestOutput
from promptd.engine.share import Share
from promptd.errors import InvalidRequestError, OverloadedError
from tests.engine.harness import Case, assert_matches_oracle, frozen, greedy, library, make_engine

TEXT = tuple(range(5, 25))
READ, WRITE = 1, 2
ROWS = 8


@dataclass
class Load:
    """One share's way of asking: how many at a time, how long."""

    share: Share
    at_once: int
    num_text: int = 20
    max_tokens: int = 20


@dataclass
class Witness:
    """Drives an engine and counts by itself what each share was given."""

    engine: Engine
    service: Counter[str] = field(default_factory=Counter)
    num_open: Counter[str] = field(default_factory=Counter)
    first_token_at: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    num_tokens: int = 0
    num_running: int = 0
    """Rows that ran in the newest step."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def ask(self, load: Load, **options: int) -> str:
        """Submit one request of a share, with a text of its own."""
        number = next(self._numbers)
        text = (number % 300, *(TEXT * 10)[: load.num_text - 1])
        request_id = f"{load.share.key}-{number}"
        self.engine.add_request(
            GenerateRequest(request_id, text, greedy(load.max_tokens), share=load.share, salt=load.share.key, **options)  # type: ignore[arg-type]
        )
        self.num_open[load.share.key] += 1
        return request_id

    def step(self, loads: list[Load]) -> None:
        """Fill every share's backlog up, run one step, count."""
        for load in loads:
            while self.num_open[load.share.key] < load.at_once:
                self.ask(load)
        plan = self.engine.scheduler.schedule
        seen: list[tuple[str, int, bool]] = []

        def observed() -> object:
            schedule = plan()
            self.num_running = len(self.engine.scheduler.running)
            seen.extend((row.seq.request.share.key, row.num_tokens, row.seq.is_decoding) for row in schedule.rows)
            return schedule

        self.engine.scheduler.schedule = observed  # type: ignore[method-assign, assignment]
        outputs = self.engine.step()
        self.engine.scheduler.schedule = plan  # type: ignore[method-assign]
        self.engine.check_integrity()
        self.num_steps += 1
        for key, num_tokens, is_decoding in seen:
            self.service[key] += num_tokens * (WRITE if is_decoding else READ)
            self.num_tokens += num_tokens
        for output in outputs:
            assert isinstance(output, RequestOutput)
            if output.token_ids:
                self.first_token_at.setdefault(output.request_id, self.num_steps)
            if output.is_last:
                self.num_open[output.request_id.partition("-")[0]] -= 1

    def steps_to_first_token(self, loads: list[Load], load: Load) -> int:
        """Ask once and step until the first token is there."""
        began, request_id = self.num_steps, self.ask(load)
        while request_id not in self.first_token_at:
            self.step(loads)
        return self.first_token_at[request_id] - began


def fresh(folder: Path, **limits: int | bool) -> Witness:
    """A small engine with room for every row's K/V."""
    defaults: dict[str, int | bool] = {"num_blocks": 256, "max_num_seqs": ROWS, "max_num_batched_tokens": 64}
    return Witness(make_engine(folder, **{**defaults, **limits}))  # type: ignore[arg-type]


def test_two_backlogged_shares_get_halves(tiny_models: dict[str, Path]) -> None:
    """Whatever they ask for: long texts against long answers, 64 at once against 12. The gap stays in VTC's bound."""
    witness = fresh(tiny_models["llama"])
    loads = [Load(Share("A"), 64, num_text=60, max_tokens=4), Load(Share("B"), 12, num_text=3, max_tokens=40)]
    # 2 max(w_p L_input, w_q M): M tokens are written between two choices of a row, here at most ROWS x max_tokens.
    bound = 2 * max(READ * 60, WRITE * ROWS * 40)
    for _ in range(200):
        witness.step(loads)
        assert abs(witness.service["A"] - witness.service["B"]) <= bound
    share = witness.service["A"] / witness.service.total()
    print(f"share of A {share:.3f}, gap {witness.service['A'] - witness.service['B']} tokens, bound {bound}")
    assert 0.47 <= share <= 0.53


def test_weights(tiny_models: dict[str, Path]) -> None:
    """Three times the weight, three times the tokens."""
    witness = fresh(tiny_models["llama"])
    for _ in range(150):
        witness.step([Load(Share("A", 3.0), 20), Load(Share("B", 1.0), 20)])
    ratio = witness.service["A"] / witness.service["B"]
    print(f"service ratio {ratio:.2f}")
    assert 2.7 <= ratio <= 3.3
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidRequestError):
            Share("A", weight)


def test_eight_shares_of_all_sizes(tiny_models: dict[str, Path]) -> None:
    """Jain's index of their service is at least 0.98."""
    witness = fresh(tiny_models["llama"])
    loads = [Load(Share(f"T{n}"), 2 + 4 * n, num_text=5 + 7 * n, max_tokens=40 - 4 * n) for n in range(8)]
    for _ in range(200):
        witness.step(loads)
    got = [witness.service[load.share.key] for load in loads]
    jain = sum(got) ** 2 / (len(got) * sum(one * one for one in got))
    print(f"Jain's index {jain:.4f}")
    assert jain >= 0.98


def test_a_flood_delays_a_newcomer_by_no_more_than_two_steps(tiny_models: dict[str, Path]) -> None:
    """A keeps 64 long requests open; each single one of B has its first token as soon as alone, give or take two steps.

    Control: where both are one share, B waits behind the flood.
    """

    def waits(flood: str, num: int) -> list[int]:
        witness = fresh(tiny_models["llama"])
        loads = [Load(Share(flood), 64, num_text=60, max_tokens=16)]
        for _ in range(12):
            witness.step(loads)
        found = []
        for _ in range(num):
            found.append(witness.steps_to_first_token(loads, Load(Share("B"), 0, num_text=10, max_tokens=5)))
            for _ in range(4):
                witness.step(loads)
        return found

    alone = fresh(tiny_models["llama"]).steps_to_first_token([], Load(Share("B"), 0, num_text=10, max_tokens=5))
    beside, same = waits("A", 6), waits("B", 1)
    print(f"steps to the first token: alone {alone}, beside a flood {beside}, within the flood {same}")
    assert max(beside) <= alone + 2
    assert min(same) > alone + 20


def test_cold_prompts_of_a_flood_do_not_delay_others(tiny_models: dict[str, Path]) -> None:
    """Each request of A brings a long new prompt that must run first; B does not wait behind them."""
    folder = tiny_models["llama"]
    witness = fresh(folder, prompt_tokens=2000)
    generator = torch.Generator().manual_seed(1)
    for number in range(30):
        embeds = torch.randn(60, frozen(folder).spec.hidden_size, generator=generator)
        request = GenerateRequest(f"A-cold{number}", TEXT, greedy(30), (encode("soft", embeds),), share=Share("A"))
        witness.engine.add_request(request)
    witness.step([])
    assert witness.steps_to_first_token([], Load(Share("B"), 0, num_text=10)) <= 3


class Untouched:
    """An account that nobody is to look at."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"somebody looked at the {name} of a share that wants nothing")


def test_a_lone_share_has_everything(tiny_models: dict[str, Path]) -> None:
    """Nothing is held back for others that want nothing: with many idle shares known, the same steps as without, and
    no step looks at any of them."""
    counts = []
    for others in (0, 50):
        witness = fresh(tiny_models["llama"])
        accounts: dict[str, object] = witness.engine.scheduler.waiting._accounts  # type: ignore[assignment]
        accounts.update({f"T{number}": Untouched() for number in range(others)})
        before, began = witness.num_tokens, witness.num_steps
        for _ in range(50):
            witness.step([Load(Share("A"), 32)])
        counts.append((witness.num_tokens - before) / (witness.num_steps - began))
    print(f"tokens a step: {counts}")
    assert counts[1] >= 0.99 * counts[0]


def test_no_row_stays_free_while_somebody_waits(tiny_models: dict[str, Path]) -> None:
    """Work-conserving while a step's tokens last: B wants two rows, A has all the others, whatever their parts are."""
    witness = fresh(tiny_models["llama"])
    loads = [Load(Share("A"), 64, num_text=4), Load(Share("B"), 2, num_text=4)]
    for at in range(100):
        witness.step(loads)
        if at > 5:
            assert witness.num_running == ROWS


def test_idleness_is_not_saved_up(tiny_models: dict[str, Path]) -> None:
    """B comes back after A has had 3,000 tokens: from then on it gets its half, not all until it has caught up."""
    witness = fresh(tiny_models["llama"])
    flood, back = Load(Share("A"), 32), Load(Share("B"), 32)
    witness.steps_to_first_token([], Load(Share("B"), 0, max_tokens=1))
    while witness.service["A"] < 3_000:
        witness.step([flood])
    before = witness.service["A"]
    began_b = witness.service["B"]
    for _ in range(100):
        witness.step([flood, back])
    got_a, got_b = witness.service["A"] - before, witness.service["B"] - began_b
    print(f"after the return: A {got_a}, B {got_b}")
    assert got_a / (got_a + got_b) >= 0.44


def test_priorities_count_within_a_share_only(tiny_models: dict[str, Path]) -> None:
    """The larger comes first among one's own; it takes nothing from another share."""
    witness = fresh(tiny_models["llama"], max_num_seqs=2)
    load, other = Load(Share("A"), 0, max_tokens=4), Load(Share("B"), 0, max_tokens=4)
    asked = [witness.ask(load, priority=priority) for priority in (0, 5, 9, 5)]
    foreign = witness.ask(other)
    while witness.engine.has_work:
        witness.step([])
    at = witness.first_token_at
    assert at[asked[2]] <= at[asked[1]] <= at[asked[3]] <= at[asked[0]]
    assert at[asked[2]] < at[asked[0]]
    assert at[foreign] == 1


def test_rows_that_give_way_say_the_same(tiny_models: dict[str, Path]) -> None:
    """Preempted for another share and resumed, a row's tokens are those that it makes alone."""
    folder = tiny_models["llama"]
    engine = make_engine(folder, num_blocks=128, max_num_seqs=4)
    cases = [Case(library(folder)[n % 8 : n % 8 + 1], TEXT[: 5 + n], greedy(12)) for n in range(10)]
    for number, case in enumerate(cases):
        share = Share("A" if number < 6 else f"B{number}")
        if number == 6:
            for _ in range(4):
                for output in engine.step():
                    cases[int(output.request_id)].outputs.append(output)
        engine.add_request(GenerateRequest(str(number), case.token_ids, case.params, case.prompts, share=share))
    while engine.has_work:
        for output in engine.step():
            cases[int(output.request_id)].outputs.append(output)
        engine.check_integrity()
    assert engine.stats().preemptions > 0
    for case in cases:
        assert len(case.tokens) == 12
        assert_matches_oracle(folder, case)


def test_a_share_that_holds_the_kv_cache_gives_some_back(tiny_models: dict[str, Path]) -> None:
    """Two long rows of A hold nearly all blocks; B's row of normal size comes in all the same, and A's go on after."""
    witness = fresh(tiny_models["llama"], num_blocks=40, block_size=4)
    flood = Load(Share("A"), 6, num_text=70, max_tokens=18)
    for _ in range(3):
        witness.step([flood])
    assert not witness.engine.blocks.can_allocate(5), "else B's row needs no room to be made"
    assert witness.steps_to_first_token([flood], Load(Share("B"), 0, num_text=17, max_tokens=3)) <= 4
    for _ in range(120):
        witness.step([flood])
    assert sum(request_id.startswith("A") for request_id in witness.first_token_at) > 6


def test_a_full_queue_has_room_for_those_who_wait_least(tiny_models: dict[str, Path]) -> None:
    """A fills the queue; B's requests come in, A's last ones end with the typed error; each request has one end."""
    engine = make_engine(tiny_models["llama"], max_num_seqs=2, max_queue=10)
    for number in range(10):
        engine.add_request(GenerateRequest(f"A{number}", TEXT, greedy(3), share=Share("A")))
    with pytest.raises(OverloadedError):  # more of its own is refused at once
        engine.add_request(GenerateRequest("A-more", TEXT, greedy(3), share=Share("A")))
    for number in range(5):
        engine.add_request(GenerateRequest(f"B{number}", TEXT, greedy(3), share=Share("B")))
    with pytest.raises(OverloadedError):
        engine.add_request(GenerateRequest("B-more", TEXT, greedy(3), share=Share("B")))
    ends: dict[str, RequestOutput] = {}
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            if output.is_last:
                assert ends.setdefault(output.request_id, output) is output
        engine.check_integrity()
    displaced = {name for name, output in ends.items() if output.error is not None}
    assert displaced == {f"A{number}" for number in range(5, 10)}
    assert all(isinstance(ends[name].error, OverloadedError) for name in displaced)
    assert len(ends) == 15


# -- the cache of prompts ------------------------------------------------------------------------------------------


def churn(folder: Path, *, salts: Callable[[int], str], now: list[float]) -> int:
    """B uses its three prompts, 60 others go through a cache for 12; return B's misses when it comes back."""
    engine = make_engine(folder, prompt_tokens=12 * 8)
    engine.prompts._clock = lambda: now[0]
    generator = torch.Generator().manual_seed(3)
    size = frozen(folder).spec.hidden_size
    own = [encode("soft", torch.randn(8, size, generator=generator)) for _ in range(3)]

    def use(prompt: object, salt: str) -> None:
        engine.add_request(GenerateRequest("one", TEXT, greedy(1), (prompt,), salt))  # type: ignore[arg-type]
        while engine.has_work:
            engine.step()
            engine.check_integrity()

    for prompt in own:
        use(prompt, "B")
    for number in range(60):
        use(encode("soft", torch.randn(8, size, generator=generator)), salts(number))
    before = engine.stats().prompt_cache_misses
    for prompt in own:
        use(prompt, "B")
    return engine.stats().prompt_cache_misses - before


def test_churn_evicts_ones_own_prompts(tiny_models: dict[str, Path]) -> None:
    """A's 60 prompts go through the cache, B's three stay. Control: where all are one caller's, they are gone."""
    folder = tiny_models["llama"]
    assert churn(folder, salts=lambda _: "A", now=[0.0]) == 0
    assert churn(folder, salts=lambda _: "B", now=[0.0]) == 3


def test_a_salt_that_is_long_idle_has_no_claim(tiny_models: dict[str, Path]) -> None:
    """What nobody has used for a minute leaves first, however little its owner holds."""
    now = [0.0]

    def salts(number: int) -> str:
        now[0] = ACTIVE_SECONDS + 1
        return "A"

    assert churn(tiny_models["llama"], salts=salts, now=now) == 3


def test_one_large_prompt_finds_room(tiny_models: dict[str, Path]) -> None:
    """A caller whose only prompt needs nearly all of the cache gets it, though others hold less than their part."""
    folder = tiny_models["llama"]
    engine = make_engine(folder, prompt_tokens=100)
    size = frozen(folder).spec.hidden_size
    for salt, count in (("B", 20), ("C", 20), ("A", 90)):
        prompt = encode("soft", torch.ones(count, size))
        engine.add_request(GenerateRequest(salt, TEXT, greedy(1), (prompt,), salt))
        for _ in range(20):
            engine.step()
            engine.check_integrity()
        assert not engine.has_work
