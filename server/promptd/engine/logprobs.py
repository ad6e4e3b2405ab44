"""Log-probabilities that requests ask for: computed on the device, told from numbers on the host. All in nats."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import torch

from promptd.engine.request import ScoreRequest, TokenLogprob
from promptd.modeling.transfer import to_device


def judged(logprobs: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """Return what `token_logprob` tells of each token `[num_rows]` under `logprobs` `[num_rows, vocab_size]`.

    float64 `[num_rows, 1 + 2 * num_top]`: the token's own, the best, and which tokens these are.
    """
    own, best = logprobs.gather(1, tokens.unsqueeze(1)), logprobs.topk(num_top)
    return torch.cat([own.double(), best.values.double(), best.indices.double()], 1)


def token_logprob(token: int, numbers: Rows[float], num_top: int) -> TokenLogprob:
    """Describe a token by one row of `judged`, with the `num_top` best."""
    width = len(numbers) // 2
    values, ids = numbers[1 : 1 + num_top], numbers[1 + width : 1 + width + num_top]
    return TokenLogprob(token, numbers[0], tuple(zip(map(int, ids), values, strict=True)))


def top_logprobs(logprobs: torch.Tensor, tokens: Rows[int], num_top: int) -> list[TokenLogprob]:
    """Describe `tokens` under `logprobs` (`[num_rows, vocab_size]`), with the `num_top` best of each row."""
    found = judged(logprobs, to_device(tokens, logprobs.device, torch.int64), num_top).tolist()
    return [token_logprob(token, numbers, num_top) for token, numbers in zip(tokens, found, strict=True)]


def scores(request: ScoreRequest, logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token of each candidate, end to end.

    Row 0 of `logits` is the text's last token; then come each candidate's tokens but its last.
    """
    rows: list[int] = []
    tokens: list[int] = []
    at = 1
    for candidate in request.candidates:
        rows += [0, *range(at, at + len(candidate) - 1)]
        tokens += candidate
        at += len(candidate) - 1
    which, whose = to_device([rows, tokens], logits.device, torch.int64)
    return torch.log_softmax(logits, -1)[which, whose]


def by_candidate(request: ScoreRequest, flat: Iterable[float]) -> tuple[tuple[float, ...], ...]:
    """Cut `scores` up again."""
    values = iter(flat)
    return tuple(tuple(next(values) for _ in candidate) for candidate in request.candidates)
