"""Prompts as shared K/V, equal text prefixes, blocks and extents."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from promptd_store import encode

from promptd.engine.block_manager import BlockManager
from promptd.engine.extents import ExtentAllocator
from promptd.engine.request import GenerateRequest
from promptd.modeling import attention_pooled, decode_kernel
from promptd.modeling.shared_spans import Run, Spans, runs_of
from tests.engine.harness import Case, assert_matches_oracle, frozen, greedy, library, make_engine, run

TEXT = tuple(range(5, 45))


def test_a_prompt_is_computed_once_and_shared(tiny_models: dict[str, Path]) -> None:
    """A soft prompt runs through the model on its first use only, and costs exactly its K/V bytes."""
    folder = tiny_models["llama"]
    soft = library(folder)[3]
    engine = make_engine(folder)
    run(engine, [Case((soft,), TEXT, greedy(3), arrives=n) for n in range(6)])
    stats = engine.stats()
    assert stats.virtual_tokens_computed == soft.num_virtual_tokens
    assert (stats.prompt_cache_misses, stats.prompt_cache_hits) == (1, 5)
    assert stats.prompt_cache_bytes == soft.num_virtual_tokens * engine.pool.bytes_per_slot


def test_the_first_use_is_one_pass(tiny_models: dict[str, Path]) -> None:
    """Loading a prompt and reading the text behind it happen in the same packed batch."""
    folder = tiny_models["llama"]
    engine = make_engine(folder)
    engine.add_request(GenerateRequest("a", TEXT, greedy(1), (library(folder)[2], library(folder)[3])))
    (output,) = engine.step()
    assert output.is_last  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [3, 7], ids=["soft", "prefix"])
def test_what_is_read_was_staged(tiny_models: dict[str, Path], number: int) -> None:
    """A prompt goes to the device once, when it gets its place, and what arrived there is what rows read."""
    prompt, staged = library(tiny_models["llama"])[number], []
    engine = make_engine(tiny_models["llama"])

    def other(tensor: torch.Tensor) -> torch.Tensor:
        staged.append(tensor)
        return tensor.flip(0)

    engine.pool.stage = other  # type: ignore[method-assign, assignment]
    cases = [Case((prompt,), TEXT, greedy(4), arrives=at) for at in (0, 0, 9)]
    run(engine, cases)
    name, tensor = next(iter(prompt.tensors.items()))
    assert len(staged) == 1 and torch.equal(staged[0], tensor)
    flipped = replace(prompt, tensors={name: tensor.flip(0)})
    for case in cases:
        assert_matches_oracle(tiny_models["llama"], replace(case, prompts=(flipped,)))


def test_chains_share_their_beginning(tiny_models: dict[str, Path]) -> None:
    """Many user prompts behind one task prompt hold the task's K/V once; another order is another chain."""
    folder = tiny_models["llama"]
    task, users = library(folder)[3], library(folder)[:3]
    engine = make_engine(folder)
    cases = [Case((task, user), TEXT, greedy(4)) for user in users]
    cases.append(Case((users[2], task), TEXT, greedy(4)))
    run(engine, cases)
    held = task.num_virtual_tokens + sum(user.num_virtual_tokens for user in users)
    held += users[2].num_virtual_tokens + task.num_virtual_tokens
    assert engine.stats().prompt_cache_bytes == held * engine.pool.bytes_per_slot
    for case in cases:
        assert_matches_oracle(folder, case)


def test_salts_never_share(tiny_models: dict[str, Path]) -> None:
    """Design invariant 10: the same prompt and text under two salts share neither prompt K/V nor text prefixes."""
    folder = tiny_models["llama"]
    engine = make_engine(folder)
    for number, salt in enumerate(("a", "b", "a")):
        engine.add_request(GenerateRequest(f"r{number}", TEXT, greedy(1), (library(folder)[2],), salt))
        (output,) = engine.step()
        assert (output.num_cached_tokens > 0) == (number == 2)
    stats = engine.stats()
    assert (stats.prompt_cache_misses, stats.prompt_cache_hits) == (2, 1)


@pytest.mark.parametrize("num_public", [1, 0])
def test_public_prompts_are_resident_once_for_all(tiny_models: dict[str, Path], num_public: int) -> None:
    """Two callers' chains (public, own): the public part is shared, what continues it and the texts are not, though
    equal. Control: the same chains with nothing public share nothing."""
    folder = tiny_models["llama"]
    public, own = library(folder)[3], library(folder)[2]
    engine = make_engine(folder)
    cases = [Case((public, own), TEXT, greedy(3)) for _ in "ab"]
    for salt, case in zip("ab", cases, strict=True):
        engine.add_request(GenerateRequest(salt, TEXT, case.params, case.prompts, salt, num_public))
        while engine.has_work:
            case.outputs += engine.step()
            engine.check_integrity()
        assert case.outputs[-1].num_cached_tokens == 0
        assert_matches_oracle(folder, case)
    num_copies = 1 if num_public else 2
    held = num_copies * public.num_virtual_tokens + 2 * own.num_virtual_tokens
    assert engine.stats().prompt_cache_bytes == held * engine.pool.bytes_per_slot
    assert engine.stats().virtual_tokens_computed == held


def test_a_public_prompt_behind_an_own_one_stays_private(tiny_models: dict[str, Path]) -> None:
    """Only the beginning of a chain can be shared: K/V of what stands behind a private prompt depends on it."""
    folder = tiny_models["llama"]
    public, own = library(folder)[3], library(folder)[2]
    engine = make_engine(folder)
    for number, (salt, chain, num_public) in enumerate(
        (("a", (own, public), 0), ("b", (own, public), 0), ("a", (public,), 1), ("b", (public,), 1))
    ):
        engine.add_request(GenerateRequest(f"r{number}", TEXT, greedy(1), chain, salt, num_public))
        engine.step()
        engine.check_integrity()
    held = 3 * public.num_virtual_tokens + 2 * own.num_virtual_tokens
    assert engine.stats().prompt_cache_bytes == held * engine.pool.bytes_per_slot
    assert engine.stats().prompt_cache_hits == 1


def test_a_prompt_that_nobody_waits_for_is_not_computed(tiny_models: dict[str, Path]) -> None:
    """An abort midway drops a half-computed soft prompt, also where a prefix stands behind it already."""
    folder = tiny_models["llama"]
    for behind in (library(folder)[6], library(folder)[1]):
        engine = make_engine(folder, max_num_batched_tokens=6, max_num_seqs=2)
        engine.add_request(GenerateRequest("a", TEXT, greedy(1), (library(folder)[3], behind)))
        engine.step()
        engine.abort("a")
        engine.check_integrity()
        assert not engine.prompts.loading
        assert engine.stats().prompt_cache_bytes == 0


def test_a_new_version_never_meets_old_kv(tiny_models: dict[str, Path]) -> None:
    """Identity is content: other tensors under the same name are another key, for prompt K/V and for texts."""
    folder = tiny_models["gpt2"]
    old = library(folder)[2]
    new = encode("soft", -2 * old.tensors["prompt_embeddings"])
    engine = make_engine(folder)
    cases = [Case((old,), TEXT, greedy(6)), Case((new,), TEXT, greedy(6), arrives=9)]
    run(engine, cases)
    assert old.version != new.version
    assert cases[0].tokens != cases[1].tokens
    for case in cases:
        assert_matches_oracle(folder, case)


def test_pinned_prompts_stay_and_idle_ones_leave_oldest_first(tiny_models: dict[str, Path]) -> None:
    """Under its byte budget the cache evicts the least recently used idle prompt, never one in use."""
    folder = tiny_models["llama"]
    shape = (8, frozen(folder).spec.hidden_size)
    prompts = [encode("soft", torch.randn(shape, generator=torch.Generator().manual_seed(n))) for n in range(4)]
    engine = make_engine(folder, prompt_tokens=24)
    long = Case((prompts[0],), TEXT, greedy(40))
    others = [Case((prompt,), TEXT, greedy(2), arrives=5 + 5 * n) for n, prompt in enumerate(prompts[1:])]
    again = Case((prompts[3],), TEXT, greedy(2), arrives=30)
    run(engine, [long, *others, again])
    stats = engine.stats()
    assert stats.prompt_cache_evictions == 1  # prompts[1] left for prompts[3]; prompts[0] was pinned
    assert stats.prompt_cache_hits == 1
    for case in (long, *others, again):
        assert_matches_oracle(folder, case)


def test_bytes_stay_within_the_budget(tiny_models: dict[str, Path]) -> None:
    """Design invariant 6: however many prompts come by, resident bytes never exceed the budget and slots come back."""
    folder = tiny_models["llama"]
    shape = (3, frozen(folder).spec.hidden_size)
    engine = make_engine(folder, prompt_tokens=20)
    for number in range(60):
        prompt = encode("soft", torch.randn(shape, generator=torch.Generator().manual_seed(number % 25)))
        run(engine, [Case((prompt,), (5, 6), greedy(1))])
        assert engine.stats().prompt_cache_bytes <= 20 * engine.pool.bytes_per_slot
    assert engine.stats().prompts_resident == 6


def test_text_prefixes_are_reused_exactly(tiny_models: dict[str, Path]) -> None:
    """Equal texts behind the same prompt reuse full blocks; the answers stay the oracle's."""
    folder = tiny_models["llama"]
    prompt = library(folder)[2]
    cases = [
        Case((prompt,), TEXT, greedy(5)),
        Case((prompt,), TEXT, greedy(5), arrives=8),
        Case((prompt,), (*TEXT[:20], 99, *TEXT[21:]), greedy(5), arrives=8),
        Case((), TEXT, greedy(5), arrives=8),
    ]
    engine = make_engine(folder)
    run(engine, cases)
    cached = [case.outputs[-1].num_cached_tokens for case in cases]
    assert cached == [0, 32, 16, 0]
    for case in cases:
        assert_matches_oracle(folder, case)
    off = make_engine(folder, enable_prefix_caching=False)
    repeat = [replace(case, outputs=[]) for case in cases]
    run(off, repeat)
    assert off.stats().cached_tokens == 0  # control


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_rows_of_one_cached_text_are_neighbours(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    """Two texts, asked for in turn, are each read once for the rows that continue them, and these are exact."""
    folder, texts = tiny_models["llama"], (TEXT, TEXT[::-1])
    engine = make_engine(folder)
    run(engine, [Case((), text, greedy(1)) for text in texts])
    seen: list[list[Run]] = []

    def noted(rows: Iterable[Spans]) -> list[Run]:
        seen.append(runs_of(rows))
        return seen[-1]

    monkeypatch.setattr(attention_pooled, "runs_of", noted)
    monkeypatch.setattr(decode_kernel, "runs_of", noted)
    cases = [Case((), (*texts[number % 2], 60, 61 + number), greedy(max_tokens)) for number in range(6)]
    run(engine, cases)
    assert len(seen) == max_tokens
    for runs in seen:
        assert [(one.num_rows, one.num_shared) for one in runs] == [(3, 32), (3, 32)]
    for case in cases:
        assert_matches_oracle(folder, case)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 6)), max_size=40))
@example([(0, 1, 0), (4, 1, 0), (4, 2, 0), (5, 1, 0), (0, 9, 0), (0, 9, 0), (0, 9, 0), (0, 5, 0)])
def test_blocks_add_up(actions: list[tuple[int, int, int]]) -> None:
    """Whatever is taken, grown, cached and given back, every block is in one state and nothing is handed out twice."""
    manager = BlockManager(32, 4)
    rows: list[list[int]] = []
    for kind, count, expected in actions:
        if kind <= 2 and manager.can_allocate(count):
            rows.append(manager.allocate(count, expected=expected))
        elif kind == 3 and rows and manager.can_allocate(1):
            rows[0] += manager.allocate(1, after=rows[0][-1], expected=expected)
        elif kind == 4 and rows:
            parent = manager.root("root")
            for number, block in enumerate(rows[-1][:2]):
                parent = manager.register(parent, (number, count, 0, 0), block)
        elif kind == 5 and rows:
            manager.release(rows.pop(0))
        manager.check_integrity()
        held: dict[int, int] = {}
        for row in rows:
            for block in row:
                held[block] = held.get(block, 0) + 1
        assert max(held.values(), default=1) == 1
        manager.check_references(held)


def test_a_row_grows_in_place_where_it_can() -> None:
    """With room left, the blocks of rows that grow in turn are adjacent, so that each is one run."""
    manager = BlockManager(64, 16)
    rows = [manager.allocate(1, expected=7) for _ in range(4)]
    for _ in range(7):
        for row in rows:
            row += manager.allocate(1, after=row[-1])
    assert all(row == list(range(row[0], row[0] + 8)) for row in rows)


def test_matching_compares_tokens_not_hashes() -> None:
    """A prefix is found only under its own root and only with equal tokens."""
    manager = BlockManager(8, 2)
    blocks = manager.allocate(2)
    node = manager.register(manager.root("a"), (1, 2), blocks[0])
    manager.register(node, (3, 4), blocks[1])
    manager.release(blocks)
    assert manager.match(manager.root("b"), (1, 2, 3, 4))[0] == []
    assert manager.match(manager.root("a"), (1, 2, 3, 5))[0] == blocks[:1]
    assert manager.match(manager.root("a"), (1, 2, 3, 4))[0] == blocks


def test_the_table_of_roots_is_bounded() -> None:
    """However many prompts come by, roots stay as few as blocks; a forgotten root finds nothing, and that is all."""
    manager = BlockManager(4, 2)
    (block,) = manager.allocate(1)
    manager.register(manager.root(0), (1, 2), block)
    manager.release([block])
    for key in range(1, 50):
        manager.root(key)
    assert len(manager._roots) == 4
    assert manager.match(manager.root(0), (1, 2))[0] == []
    manager.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 16))
def test_extents_add_up(seed: int) -> None:
    """Slots of prompts are exact, disjoint, inside the region, and join again when given back."""
    rng = random.Random(seed)
    extents = ExtentAllocator(100, 50)
    held: list[tuple[tuple[int, int], ...]] = []
    for _ in range(40):
        size = rng.randint(1, 20)
        if rng.random() < 0.6 and extents.num_free >= size:
            held.append(extents.allocate(size))
            assert sum(length for _, length in held[-1]) == size
        elif held:
            extents.release(held.pop(rng.randrange(len(held))))
        extents.check_integrity()
        slots = [slot for spans in held for start, length in spans for slot in range(start, start + length)]
        assert len(set(slots)) == len(slots) and all(100 <= slot < 150 for slot in slots)
    for spans in held:
        extents.release(spans)
    assert extents.allocate(50) == ((100, 50),)


def test_check_integrity_sees_a_leak(tiny_models: dict[str, Path]) -> None:
    """Control: a block that a sequence forgot, or a pin too few, is found."""
    engine = make_engine(tiny_models["llama"])
    engine.add_request(GenerateRequest("a", TEXT, greedy(9), (library(tiny_models["llama"])[2],)))
    engine.step()
    engine.check_integrity()
    forgotten = engine.scheduler.running[0].blocks.pop()
    with pytest.raises(RuntimeError):
        engine.check_integrity()
    engine.scheduler.running[0].blocks.append(forgotten)
    engine.check_integrity()
    for wrong in (-2, 1):
        engine.scheduler.running[0].chain[0].num_pins += wrong
        with pytest.raises(RuntimeError):
            engine.check_integrity()
        engine.scheduler.running[0].chain[0].num_pins -= wrong
