"""What is asked of the comparison with peers, as rows of the table; reads the book, runs nothing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from tests.bench.book import Book, Row, paired_ratio
from tests.bench.versus.contenders import HALF, OURS, PEERS, QUANTIZED

BEST_EXACT = tuple(peer.name for peer in PEERS if peer.is_exact)
ROUND_RATIOS = (
    ("gpt2-small", "w1", "vLLM", 1.25),
    ("qwen2-0.5b", "w1", "vLLM", 1.3),
    ("gpt2-small", "w1", "PEFT, one at a time", 10.0),
)
"""(model, workload, peer, least ratio), both sides in the same rounds."""
CROSS_RATIOS = (
    ("gpt2-small", "OpenVINO GenAI", 1.0),
    ("gpt2-small", "CTranslate2", 1.4),
    ("qwen2-0.5b", "OpenVINO GenAI", 1.0),
)
"""(model, peer, least ratio): our rows under a soft prompt each against a peer's without any."""
QUANTIZED_RATIOS = (("gpt2-small", 1.0), ("qwen2-0.5b", 1.3))
"""(model, least ratio): our 8-bit rows under a soft prompt each against CTranslate2's without any."""
HALF_RATIOS = (
    ("w1", "a soft prompt each", "vLLM, bfloat16"),
    ("w0", "no prompts", "vLLM, bfloat16"),
    ("w0", "no prompts", "OpenVINO GenAI, bfloat16"),
    ("w2", "one row alone", "vLLM, bfloat16"),
    ("w2", "one row alone", "OpenVINO GenAI, bfloat16"),
)
"""(workload, its name, peer), all in bfloat16, in the same rounds; nobody set a least ratio."""
START_TARGET = 0.1


def key_of(model: str, workload: str, peer: str) -> str:
    """Where the series of a pair begin in the book."""
    return f"versus/{model}/{workload}/{peer}"


def our_rates(book: Book, model: str, workload: str) -> list[float]:
    """Return promptd's rates in all rounds, beside whomever."""
    return [rate for peer in PEERS for rate in book.series(f"{key_of(model, workload, peer.name)}/ours")]


def ratio_of(book: Book, model: str, workload: str, peer: str) -> float | None:
    """Return promptd's rate over the peer's, the median of the rounds; None where nothing was measured."""
    key = key_of(model, workload, peer)
    ours = book.series(f"{key}/ours")
    return paired_ratio(ours, book.series(f"{key}/theirs")[: len(ours)]) if ours else None


def target_rows(book: Book, models: Sequence[str]) -> list[Row]:
    """Return a row for each target whose two sides were measured."""
    rows = []
    for model, workload, peer, least in ROUND_RATIOS:
        ratio = ratio_of(book, model, workload, peer)
        if model in models and ratio is not None:
            rows.append(_row(f"{model}, a soft prompt each : {peer}", least, ratio))
    for model, peer, least in CROSS_RATIOS:
        ours, theirs = our_rates(book, model, "w1"), book.series(f"{key_of(model, 'w0', peer)}/theirs")
        if model in models and ours and theirs:
            ratio = statistics.median(ours) / statistics.median(theirs)
            rows.append(_row(f"{model}, a soft prompt each : {peer} without prompts", least, ratio))
    for model, least in QUANTIZED_RATIOS:
        ours = book.series(f"{key_of(model, 'w1', QUANTIZED.name)}/theirs")
        theirs = book.series(f"{key_of(model, 'w0', 'CTranslate2, int8')}/theirs")
        if model in models and ours and theirs:
            ratio = statistics.median(ours) / statistics.median(theirs)
            rows.append(_row(f"{model}, 8 bits, a soft prompt each : CTranslate2, int8 without prompts", least, ratio))
    for model, (workload, name, peer) in itertools.product(models, HALF_RATIOS):
        ours, theirs = (book.series(f"{key_of(model, workload, each)}/theirs") for each in (HALF.name, peer))
        if ours and len(ours) == len(theirs):
            ratio = paired_ratio(ours, theirs)
            rows.append(
                Row(f"{model}, bfloat16, {name} : {peer.removesuffix(', bfloat16')}", "", f"{ratio:.2f} x", None)
            )
    for model in models:
        alone = {peer: ratio_of(book, model, "w2", peer) for peer in BEST_EXACT}
        known = {peer: ratio for peer, ratio in alone.items() if ratio is not None}
        if known:
            best = min(known, key=known.__getitem__)
            rows.append(_row(f"{model}, one row alone : the best float32 peer, {best}", 1.0, known[best]))
        mine, theirs = (book.series(f"versus/{model}/{name}/start_seconds") for name in (OURS.name, "vLLM"))
        if mine and theirs:
            share = statistics.median(mine) / statistics.median(theirs)
            shown = f"{share:.2f} x ({statistics.median(mine):.1f} : {statistics.median(theirs):.1f} s)"
            rows.append(Row(f"{model}, start-up : vLLM's", f"<= {START_TARGET} x", shown, share <= START_TARGET))
    return rows


def _row(check: str, least: float, ratio: float) -> Row:
    return Row(check, f">= {least:g} x", f"{ratio:.2f} x", ratio >= least)
