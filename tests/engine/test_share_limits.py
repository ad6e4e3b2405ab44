"""What a share may have waiting and resident at most, whatever it asks for; others do not notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, RequestOutput
from promptd.engine.share import Share
from promptd.errors import QuotaError, RateLimitError
from tests.engine.harness import greedy, library, make_engine

TEXT = tuple(range(5, 25))


@dataclass(frozen=True)
class OwnPlaces:
    """So many, and nobody else has any of them."""

    limit: int

    def surplus(self, num_waiting: int) -> int:
        """All above the limit."""
        return max(0, num_waiting - self.limit)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """The last output of every request, every pool checked after every step."""
    last = {}
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestOutput) and output.is_last:
                last[output.request_id] = output
        engine.check_integrity()
    return last


def ask(number: int, share: Share, prompts: tuple[int, ...] = (), *, folder: Path, tokens: int = 4) -> GenerateRequest:
    """A request of a share."""
    chain = tuple(library(folder)[one] for one in prompts)
    return GenerateRequest(f"{share.key}{number}", TEXT, greedy(tokens), chain, salt=share.key, share=share)


@pytest.mark.parametrize("max_waiting", [0, 3, None])
def test_no_more_wait_than_may(tiny_models: dict[str, Path], max_waiting: int | None) -> None:
    """Two run, so many wait, the newest others are told when to come again; without a limit (the control) all wait."""
    folder = tiny_models["llama"]
    engine = make_engine(folder, max_num_seqs=2)
    share, other = Share("a", places=None if max_waiting is None else OwnPlaces(max_waiting)), Share("b")
    for number in range(10):
        engine.add_request(ask(number, share, folder=folder))
    ended = finish(engine)
    refused = sorted(name for name, output in ended.items() if output.error is not None)
    expected = [] if max_waiting is None else [f"a{number}" for number in range(2 + max_waiting, 10)]
    assert refused == expected
    for name in refused:
        error = ended[name].error
        assert isinstance(error, RateLimitError)
        assert (error.code, error.retry_after_seconds) == ("too_many_queued_requests", 1)
    for number in range(3):
        engine.add_request(ask(number, share, folder=folder, tokens=8))
        engine.add_request(ask(number, other, folder=folder))
    others = {name: output.error for name, output in finish(engine).items() if name.startswith("b")}
    assert others == dict.fromkeys(("b0", "b1", "b2"))


def test_what_thinks_of_no_places_keeps_its_own(tiny_models: dict[str, Path]) -> None:
    """A request of the share without any (a trial of the server's) is not refused, and the limit holds beside it."""
    folder = tiny_models["llama"]
    engine = make_engine(folder, max_num_seqs=1)
    for number in range(3):
        engine.add_request(ask(number, Share("a", places=OwnPlaces(1)), folder=folder))
    engine.add_request(ask(3, Share("a"), folder=folder))
    refused = {name for name, output in finish(engine).items() if output.error is not None}
    assert refused == {"a1", "a2"}


def test_no_more_is_resident_than_may(tiny_models: dict[str, Path]) -> None:
    """A share that goes through many prompts evicts its own; another's stay, though the cache has room for all."""
    folder = tiny_models["llama"]
    for has_limit in (True, False):
        engine = make_engine(folder)
        slot = engine.pool.bytes_per_slot
        share = Share("a", max_resident_bytes=20 * slot if has_limit else None)
        engine.add_request(ask(0, Share("b"), (3,), folder=folder))
        finish(engine)
        most = 0
        for number, prompt in enumerate((0, 1, 2, 3, 6, 7, 0)):  # 1, 3, 8, 17, 7, 20, 1 tokens
            engine.add_request(ask(number, share, (prompt,), folder=folder))
            (output,) = finish(engine).values()
            assert output.error is None
            most = max(most, engine.prompts._held["a"])
        assert (most <= 20) == has_limit
        assert {key[0] for key in engine.prompts._entries} == {"a", "b"}
        assert engine.prompts._held["b"] == 17


def test_rows_wait_for_room_of_their_own(tiny_models: dict[str, Path]) -> None:
    """What runs keeps its prompts; the next of the share waits for them, all end well, and a chain counts whole."""
    folder = tiny_models["llama"]
    engine = make_engine(folder)
    share = Share("a", max_resident_bytes=20 * engine.pool.bytes_per_slot)
    for number, chain in enumerate([(3,), (7,), (2, 6), (3,)]):
        engine.add_request(ask(number, share, chain, folder=folder))
    ended = finish(engine)
    assert len(ended) == 4
    assert not any(output.error for output in ended.values())
    with pytest.raises(QuotaError) as refused:  # no waiting helps
        engine.add_request(ask(9, share, (3, 2), folder=folder))
    assert refused.value.param == "resident_bytes"
