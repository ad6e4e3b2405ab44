"""Logits to tokens, one set of parameters a row.

A row's draw depends on its seed and on how many tokens it has made, never on its neighbours: each draw takes one
uniform number from a hash of (seed, index) and inverts the row's own distribution.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from promptd.engine.request import SamplingParams
from promptd.modeling.transfer import to_device

_SORTED_AT_ONCE = 1024
_STRETCH = 256
"""Logits whose largest is looked for at once."""
_FEW = 1 << 15
"""Logits of all rows whose largest ones are found before a second operation has begun."""


@dataclass(slots=True)
class SamplingRow:
    """What the sampler needs of one row."""

    params: SamplingParams
    seed: int
    prompt_token_ids: Rows[int]
    output_token_ids: Rows[int]
    eos_token_ids: frozenset[int]

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature touches this row's logits."""
        params = self.params
        return bool(params.logit_bias) or params.looks_back or len(self.output_token_ids) < params.min_tokens


def uniform(seed: int, index: int) -> float:
    """Return the `index`-th number in [0, 1) of a seed's stream."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53  # 53 bits: 64 could round up to 1


def sample(logits: torch.Tensor, rows: Rows[SamplingRow]) -> torch.Tensor:
    """Pick one token a row from `[num_rows, vocab_size]` logits, which may be changed in place; int64 `[num_rows]`.

    Nothing waits for the device. Of logits that are not finite the token says nothing.
    """
    for number, row in enumerate(rows):
        if row.changes_logits:
            _adjust(logits[number], row)
    drawn = [number for number, row in enumerate(rows) if row.params.temperature > 0]
    if len(drawn) == len(rows):
        return _draw(logits.float(), rows)
    tokens = first_largest(logits)
    if drawn:
        index = to_device(drawn, logits.device, torch.int64)
        tokens.index_copy_(0, index, _draw(logits.index_select(0, index).float(), [rows[n] for n in drawn]))
    return tokens


def first_largest(logits: torch.Tensor) -> torch.Tensor:
    """Return what `argmax(-1)` returns for `[num_rows, vocab_size]`: of several largest the first, or the first NaN.

    On the CPU torch walks a row number by number, and finds the largest numbers of its stretches ten times as fast. So
    the stretch is found first, then the place in it. What is left behind the last whole stretch overlaps it.
    """
    size = logits.shape[-1]
    if logits.is_cuda or size < 2 * _STRETCH or logits.numel() < _FEW:
        return logits.argmax(-1)
    whole = logits[:, : size // _STRETCH * _STRETCH].unflatten(-1, (-1, _STRETCH))
    largest = torch.cat([whole.amax(-1), logits[:, -_STRETCH:].amax(-1, keepdim=True)], -1)
    first = (largest.argmax(-1, keepdim=True) * _STRETCH).clamp_max(size - _STRETCH)
    stretch = logits.gather(-1, first + torch.arange(_STRETCH))
    return (first + stretch.argmax(-1, keepdim=True)).squeeze(-1)


def _adjust(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply penalties, bias and minimum length to one row `[vocab_size]`, in place."""
    params, device = row.params, logits.device

    def add(changes: Mapping[int, float]) -> None:
        ids, values = to_device([*changes], device, torch.int64), to_device([*changes.values()], device, logits.dtype)
        logits.index_add_(0, ids, values)

    if params.repetition_penalty != 1.0:
        ids = to_device(sorted({*row.prompt_token_ids, *row.output_token_ids}), device, torch.int64)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.output_token_ids:
        counts = Counter(row.output_token_ids)
        add({token: -params.presence_penalty - params.frequency_penalty * count for token, count in counts.items()})
    if params.logit_bias:
        add(params.logit_bias)
    if len(row.output_token_ids) < params.min_tokens:
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else row.eos_token_ids)}
        logits.index_fill_(0, to_device(sorted(ends), device, torch.int64), -torch.inf)


def _draw(logits: torch.Tensor, rows: Rows[SamplingRow]) -> torch.Tensor:
    """Draw from softmax(logits / temperature) cut by top_k, top_p and min_p; fp32 `[num_rows, vocab_size]`."""

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return to_device(values, logits.device, dtype).unsqueeze(1)

    params = [row.params for row in rows]
    probs = torch.softmax(logits / column([max(p.temperature, 1e-5) for p in params]), -1)
    for number, p in enumerate(params):
        if 0 < p.top_k < probs.shape[1]:
            row = probs[number]
            row.masked_fill_(row < row.topk(p.top_k).values[-1], 0)
    if any(p.top_p < 1.0 for p in params):
        if probs.is_cuda:
            _cut_top_p_sorted(probs, column([p.top_p for p in params]))
        else:
            for number, p in enumerate(params):
                if p.top_p < 1.0:
                    _cut_top_p(probs[number], p.top_p)
    if any(p.min_p for p in params):
        probs.masked_fill_(probs < column([p.min_p for p in params]) * probs.amax(-1, keepdim=True), 0)
    total = probs.double().cumsum(-1)
    draws = column([uniform(row.seed, len(row.output_token_ids)) for row in rows], torch.float64)
    # `right=True` never lands on an entry of probability zero in front of the target.
    tokens = torch.searchsorted(total, draws * total[:, -1:], right=True).squeeze(1)
    return tokens.clamp_(max=probs.shape[1] - 1)


def _cut_top_p_sorted(probs: torch.Tensor, top_p: torch.Tensor) -> None:
    """Do what `_cut_top_p` does for all rows at once and without waiting for the device; `top_p` `[num_rows, 1]`."""
    values = probs.sort(-1, descending=True).values
    is_kept = values.cumsum(-1) - values < top_p * probs.sum(-1, keepdim=True)
    least = values.gather(1, is_kept.sum(-1, keepdim=True).clamp_(min=1) - 1)
    probs.masked_fill_((probs < least) & (top_p < 1.0), 0)


def _cut_top_p(probs: torch.Tensor, top_p: float) -> None:
    """Zero everything outside the smallest set of most likely tokens whose share reaches `top_p`; `[vocab_size]`.

    The least likely member is found by splitting at the mean: sorting a vocabulary takes as long as the model.
    """
    limit = top_p * float(probs.sum())
    pool, above = probs, 0.0  # where the least likely member is, and the mass of what is likelier than all of it
    while len(pool) > _SORTED_AT_ONCE:
        is_high = pool > pool.mean()
        high = pool[is_high]
        if len(high) in (0, len(pool)):  # all equal
            break
        mass = above + float(high.sum())
        pool, above = (high, above) if mass >= limit else (pool[~is_high], mass)
    values = pool.sort(descending=True).values
    num_kept = int((above + values.cumsum(0) - values < limit).sum())
    probs[probs < values[max(num_kept, 1) - 1]] = 0
