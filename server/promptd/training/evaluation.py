"""How good a prompt is on rows that nothing trains on.

Everything here takes the folded prompt (or None for the bare model), never the live parameters: what is measured is
what will be served.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from promptd.modeling import FrozenModel
from promptd.training.context import FrozenContext
from promptd.training.encoding import Encoded, evaluation_batches
from promptd.training.objectives import Objective, Tally
from promptd.training.passes import Share, run_shares
from promptd.training.scores import Scores

MAX_BATCH_TOKENS = 4096


def evaluate(
    model: FrozenModel,
    prompt: torch.Tensor | None,
    rows: Sequence[Encoded],
    objective: Objective,
    *,
    behind: FrozenContext | None = None,
) -> Scores:
    """Score rows under a folded prompt, or under what it stands behind alone.

    Raises `NumericalError` where a loss is not finite.
    """
    tallies: list[Tally] = []
    for batch in evaluation_batches([objective.num_tokens(row) for row in rows], MAX_BATCH_TOKENS):
        share = Share(objective, [rows[index] for index in batch], prompt, context=behind)
        run_shares(model, [share])
        tallies.append(share.result)
    return Scores.of(tallies, has_labels=objective.has_labels)
