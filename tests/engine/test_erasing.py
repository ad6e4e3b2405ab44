"""What is erased is in no cache of the engine any more, nor in its memory; what runs ends as it must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, RequestOutput
from promptd.errors import NotFoundError
from tests.engine.harness import Case, greedy, library, make_engine, run

TEXT = tuple(range(5, 45))


@pytest.mark.parametrize("kind", [3, 7, 8], ids=["soft", "prefix", "text"])
def test_a_version_is_gone_from_every_chain(tiny_models: dict[str, Path], kind: int) -> None:
    """Alone, at a chain's beginning and at its end, under every salt; other prompts stay, and slots are zeros."""
    folder = tiny_models["llama"]
    gone, stays = library(folder)[kind], library(folder)[2]
    engine = make_engine(folder)
    chains = [((gone,), "a"), ((gone, stays), "a"), ((stays, gone), "b"), ((stays,), "b")]
    for number, (prompts, salt) in enumerate(chains):
        engine.add_request(GenerateRequest(f"r{number}", TEXT, greedy(2), prompts, salt=salt))
    iterate(engine)
    assert engine.prompts.num_resident == 4
    entries = [entry for key, entry in engine.prompts._entries.items() if gone.version in key]
    spans = [span for entry in entries for span in entry.spans]
    cached = engine.blocks.num_allocatable

    def kept() -> int:
        return sum(written(engine.pool.keys[:, :, start : start + length]) for start, length in spans)

    assert kept() > 0  # the control
    assert engine.erase("nobody", [gone.version]) == 0  # another's of the same content is its own
    assert engine.erase("a", [], [gone.version]) == 3
    assert (engine.prompts.num_resident, kept()) == (1, 0)
    assert engine.blocks.num_allocatable == cached
    engine.prompts.check_integrity()
    engine.blocks.check_integrity()
    misses = engine.stats().prompt_cache_misses
    engine.add_request(GenerateRequest("again", TEXT, greedy(2), (gone,), salt="a"))
    (output,) = [one for one in iterate(engine) if one.is_last]
    assert engine.stats().prompt_cache_misses == misses + 1
    assert output.num_cached_tokens == 0  # the text behind it is not found either


def iterate(engine: Engine) -> list[RequestOutput]:
    """All outputs until nothing is left to do, every pool checked."""
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += [one for one in engine.step() if isinstance(one, RequestOutput)]
        engine.check_integrity()
    return outputs


def written(slots: torch.Tensor) -> int:
    """Numbers that are neither zero nor what a fresh pool has."""
    return int(torch.nan_to_num(slots).count_nonzero())


def test_what_runs_under_a_version_finishes_and_then_it_goes(tiny_models: dict[str, Path]) -> None:
    """Its tokens are those of an undisturbed run; the entry is dropped with the last row that needs it."""
    folder = tiny_models["llama"]
    prompt = library(folder)[3]
    case = Case((prompt,), TEXT, greedy(12))
    run(make_engine(folder), [case])
    engine = make_engine(folder)
    engine.add_request(GenerateRequest("a", TEXT, greedy(12), (prompt,), salt="t"))
    outputs = [one for one in engine.step() if isinstance(one, RequestOutput)]
    assert engine.erase("t", [prompt.version]) == 1
    assert engine.prompts.num_resident == 1
    outputs += iterate(engine)
    assert [token for one in outputs for token in one.token_ids] == case.tokens
    assert engine.prompts.num_resident == 0
    engine.prompts.check_integrity()


def test_a_salt_is_gone_with_its_requests(tiny_models: dict[str, Path]) -> None:
    """Running and waiting ones end with a typed error, texts and prompts under it are dropped; another's finish."""
    folder = tiny_models["llama"]
    prompt = library(folder)[3]
    engine = make_engine(folder)
    engine.add_request(GenerateRequest("mine", TEXT, greedy(20), (prompt,), salt="tenant/a"))
    engine.add_request(GenerateRequest("other", TEXT, greedy(20), (prompt,), salt="tenant/b"))
    engine.step()
    engine.add_request(GenerateRequest("late", TEXT, greedy(20), (prompt,), salt="tenant/a"))
    assert engine.erase("tenant/a", None) == 1
    ended = {one.request_id: one.error for one in iterate(engine) if one.is_last}
    assert isinstance(ended["mine"], NotFoundError) and isinstance(ended["late"], NotFoundError)
    assert ended["other"] is None
    assert {key[0] for key in engine.prompts._entries} == {"tenant/b"}
    assert {key[0] for key in engine.blocks._roots if isinstance(key, tuple)} == {"tenant/b"}  # type: ignore[index]
    engine.prompts.check_integrity()
    engine.blocks.check_integrity()
    assert engine.erase("tenant/a", None) == 0


def test_erased_texts_are_zeros(tiny_models: dict[str, Path]) -> None:
    """The K/V of a text that only the cache had is overwritten; without erasing (the control) it lies there."""
    folder = tiny_models["llama"]
    engine = make_engine(folder)
    engine.add_request(GenerateRequest("a", TEXT, greedy(2), (), salt="tenant/a"))
    iterate(engine)
    blocks, size = list(engine.blocks._cached), engine.config.block_size
    assert len(blocks) == len(TEXT) // size

    def kept() -> int:
        slots = torch.tensor([block * size + n for block in blocks for n in range(size)])
        return written(engine.pool.values.index_select(2, slots))

    assert kept() > 0
    engine.erase("tenant/b", None)
    assert kept() > 0
    engine.erase("tenant/a", None)
    assert kept() == 0
