"""One pass over the frozen model that many jobs share, and what to do when it does not fit or one of them is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from promptd.modeling import FrozenModel
from promptd.training.context import FrozenContext
from promptd.training.encoding import Encoded
from promptd.training.forward import forward_groups
from promptd.training.forward_pairs import forward_pairs
from promptd.training.forward_sources import forward_sources
from promptd.training.objectives import Objective, Tally

BetweenLayers = Callable[[], None]

MAX_SHARE_TOKENS = 512
"""Tokens of one share. Part of a job's arithmetic: the same alone and beside others, so that its result is the same."""


@dataclass(slots=True)
class Share:
    """One job's part of a pass: some of its rows behind one prompt."""

    objective: Objective
    rows: Sequence[Encoded]
    prompt: torch.Tensor | None
    """A leaf whose `grad` the pass adds to where it requires one; otherwise the rows are only measured."""
    scale: float = 1.0
    """What the summed loss is multiplied by before its gradient is taken: 1 / terms of the whole batch."""
    context: FrozenContext | None = None
    """What prompt and rows stand behind."""
    tally: Tally | None = None
    """Set by the pass."""

    @property
    def result(self) -> Tally:
        """The tally; asking before a pass has run the share is a bug of whoever runs passes."""
        if self.tally is None:
            raise RuntimeError("a share was handed back before a pass had run it")
        return self.tally

    @property
    def learns(self) -> bool:
        """Whether a gradient is wanted."""
        return self.prompt is not None and self.prompt.requires_grad

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model, without the prompt's."""
        return sum(self.objective.num_tokens(row) for row in self.rows)


Result = TypeVar("Result")
Shares = Generator[Share, None, Result]
"""Parts of passes, one after the other, and what comes of them."""


def run_shares(model: FrozenModel, shares: Sequence[Share], between_layers: BetweenLayers | None = None) -> None:
    """Run all shares and set their tallies; those that learn get their gradients added, all or none of them.

    Shares that learn and shares that are only measured take a pass each: measuring needs no activations kept.
    """
    learning = [share for share in shares if share.learns]
    measured = [share for share in shares if not share.learns]
    if measured:
        with torch.no_grad():
            _forward(model, measured, between_layers)
    if learning:
        losses = [tally.loss * share.scale for share, tally in _forward(model, learning, between_layers)]
        if between_layers is not None:  # the last layer and the head take as long forwards as backwards
            between_layers()
        # Taken apart from the leaves first: a pass that fails half-way has then changed nothing.
        leaves = list({id(share.prompt): share.prompt for share in learning if share.prompt is not None}.values())
        gradients = torch.autograd.grad(losses, leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _forward(
    model: FrozenModel, shares: Sequence[Share], between_layers: BetweenLayers | None
) -> list[tuple[Share, Tally]]:
    groups = [
        dataclasses.replace(
            share.objective.texts(share.rows, share.prompt),
            context=share.context,
            num_target=share.objective.num_target_tokens,
        )
        for share in shares
    ]
    tallies = []
    if any(share.objective.wants_keys for share in shares) and not model.has_sources:
        kept: list[torch.Tensor] = []
        outputs = forward_groups(model, groups, between_layers=between_layers, kept=kept)
        for share, key_values in zip(shares, kept, strict=True):
            share.objective.keep(share.rows, key_values)
    else:
        outputs = _forward_of(model)(model, groups, between_layers=between_layers)
    for share, logits in zip(shares, outputs, strict=True):
        tally = share.objective.tally(share.rows, logits)
        share.tally = dataclasses.replace(tally, loss=tally.loss.detach())
        tallies.append((share, tally))
    return tallies


def _forward_of(model: FrozenModel) -> Callable[..., list[torch.Tensor]]:
    """Return the pass in which this model's texts are read."""
    if not model.has_sources:
        return forward_groups
    return forward_sources if model.reads_whole else forward_pairs


def run_what_fits(
    model: FrozenModel, shares: Sequence[Share], between_layers: BetweenLayers | None = None
) -> dict[int, Exception]:
    """Run shares; return the errors of those that cannot run, by their index. The others do not notice.

    A pass that does not fit into memory is cut into smaller ones, down to one row.
    """
    try:
        run_shares(model, shares, between_layers)
    except Exception as error:  # noqa: BLE001 - whatever it was, the shares are run apart to find whose it is
        if len(shares) > 1:
            apart = [run_what_fits(model, [share], between_layers) for share in shares]
            return {index: failed[0] for index, failed in enumerate(apart) if failed}
        if not is_out_of_memory(error):
            return {0: error}
        return _run_halves(model, shares[0], between_layers, error)
    return {}


def _run_halves(
    model: FrozenModel, share: Share, between_layers: BetweenLayers | None, error: Exception
) -> dict[int, Exception]:
    if len(share.rows) == 1:
        return {0: error}
    middle = len(share.rows) // 2
    halves = [dataclasses.replace(share, rows=rows) for rows in (share.rows[:middle], share.rows[middle:])]
    tallies = []
    for half in halves:
        failed = run_what_fits(model, [half], between_layers)
        if failed:
            return failed
        tallies.append(half.result)
    share.tally = tallies[0] + tallies[1]
    return {}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an exception of torch says that memory ran out, on the device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
