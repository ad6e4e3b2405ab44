"""Behind the last layer's attention only those tokens are computed whose next token is asked for.

What stands there works token by token, and what it makes of the others nobody reads: their keys and values are stored
by then. Of a text that is read, that is all but one token, and most of what a layer costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from promptd.modeling.attention import Attends, Site
from promptd.modeling.frozen_linear import FrozenLinear

_wanted: ContextVar[torch.Tensor | None] = ContextVar("wanted", default=None)  # passes of several threads lie apart


class LastLinear(nn.Module):
    """A linear layer behind the last attention: zeros stand for the tokens that nobody asks for."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[1, num_tokens, in_features]` to `[1, num_tokens, out_features]`."""
        wanted = _wanted.get()
        if wanted is None:
            every: torch.Tensor = self.linear(hidden)
            return every
        some: torch.Tensor = self.linear(hidden.index_select(1, wanted))
        return some.new_zeros(1, hidden.shape[1], some.shape[2]).index_copy_(1, wanted, some)


@contextmanager
def only_tokens(wanted: torch.Tensor, num_tokens: int) -> Iterator[None]:
    """While this lasts, compute a pass's last layer for `wanted` alone (`[num_wanted]`, int64, ascending).

    Where these are most of the tokens, all are computed: leaving a few out saves less than picking the others costs.
    """
    token = _wanted.set(wanted if 2 * len(wanted) <= num_tokens else None)
    try:
        yield
    finally:
        _wanted.reset(token)


def narrow_last_layer(model: nn.Module, read: Callable[[Attends], Any], num_tokens: int) -> int:
    """Wrap every linear layer that `read` calls behind its last attention on all of `num_tokens`; return how many."""
    called: dict[nn.Module, None] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[:2] == (1, num_tokens):  # the output layer is called on what is asked for
            called[module] = None

    class Attention:
        """Forgets what was called before it."""

        def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            """Attend to nothing."""
            called.clear()
            return torch.zeros_like(query).transpose(1, 2)

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D | FrozenLinear):
                hooks.callback(module.register_forward_pre_hook(note).remove)
        read(Attention())
    parents = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    for parent, name, child in parents:
        if child in called:
            setattr(parent, name, LastLinear(child))
    return len(called)
