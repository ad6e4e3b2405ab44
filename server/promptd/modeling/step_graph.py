"""A decode step as the operations that it consists of: recorded once, run without the model's own Python.

The modules of a model of transformers make thousands of calls for a step, which take longer than many of the products
between them: these push everything else out of the caches. What they compute is the same in every step of single
tokens; only sizes follow the number of rows. So two steps are recorded, of different numbers of rows, and where their
arguments differ it is by that number. torch.fx makes one function of them, for any number of rows: what a CUDA graph
is to a GPU.

A model that looks at the numbers in its tensors, or whose graph does not give the bits of its own forward, keeps that.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from promptd.modeling.attention import Attends, Site
from promptd.modeling.recording import NotOneGraphError, Operation, Place, Recording, recording

logger = logging.getLogger(__name__)

Read = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Attends], torch.Tensor]
"""See `Family.read`."""
Embed = Callable[[torch.Tensor], torch.Tensor]
_RECORDED = 3, 5
"""Numbers of rows. No size of a model is a multiple of these and of nothing else in both recordings."""
_TRIED = 1, 67
_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Attends]


class StepGraph:
    """One model's step of single tokens, each of which is asked for what follows it."""

    def __init__(self, run: Callable[..., torch.Tensor], constants: Sequence[Any]) -> None:
        self._run = run
        self._constants = constants

    @classmethod
    def of(cls, read: Read, embed: Embed, vocab_size: int, max_length: int) -> StepGraph:
        """Record `read` and try the graph, on tokens and positions of all sizes. Raises `NotOneGraphError`."""

        def inputs_of(num_rows: int) -> _Inputs:
            index = torch.arange(num_rows)
            with torch.no_grad():
                embeds = embed((index + 1) * 7919 % vocab_size)
            return embeds, (index + 1) * 1009 % max_length, index, _TrialAttention()

        first, second = (_recorded(read, inputs_of(num_rows)) for num_rows in _RECORDED)
        graph = cls(*_Builder(first, second).build())
        for num_rows in _TRIED:
            inputs = inputs_of(num_rows)
            if not torch.equal(graph(*inputs), read(*inputs)):
                raise NotOneGraphError(f"{num_rows} rows come out otherwise")
        return graph

    @torch.no_grad()
    def __call__(
        self, embeds: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor, batch: Attends
    ) -> torch.Tensor:
        """Read single tokens `[num_rows, hidden_size]`; return logits `[num_rows, vocab_size]`."""
        return self._run(len(embeds), embeds, positions, logits_index, batch, *self._constants)


def step_graph(read: Read, embed: Embed, vocab_size: int, max_length: int) -> StepGraph | None:
    """Record a model's step; None where it is no graph: the log says why."""
    try:
        return StepGraph.of(read, embed, vocab_size, max_length)
    except NotOneGraphError as error:
        logger.info("every step runs the model's own Python: %s", error)
    except Exception:  # whatever torch or its graphs could not do: the model itself has been proven
        logger.warning("every step runs the model's own Python: recording one failed", exc_info=True)
    return None


class _TrialAttention:
    """Makes something of all that attention is given, as it would lie in memory."""

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Mix the three."""
        mixed = (key * value).repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (query * site.scale + mixed).transpose(1, 2).contiguous()


@torch.no_grad()
def _recorded(read: Read, inputs: _Inputs) -> tuple[Recording, torch.Tensor]:
    with recording(inputs) as noted:
        return noted, read(*inputs)


def _bound(operation: Operation) -> Callable[..., Any]:
    """Return the function of torch's Python API that does the same, where there is one: it is called twice as fast."""
    overload: Any = operation.function
    name = overload._schema.name.removeprefix("aten::")
    function: Callable[..., Any] | None = getattr(torch, name, None) or getattr(torch.Tensor, name, None)
    if function is None or overload._schema.is_mutable:
        return operation.function
    try:
        function(*operation.args, **operation.kwargs)
    except (TypeError, RuntimeError, ValueError):  # it has another signature
        return operation.function
    return function


class _Builder:
    """Makes one graph of two recordings."""

    def __init__(self, first: tuple[Recording, torch.Tensor], second: tuple[Recording, torch.Tensor]) -> None:
        (self._first, first_out), (self._second, second_out) = first, second
        self._outs = first_out, second_out
        self._graph = fx.Graph()
        self._constants: list[Any] = []
        self._num_rows = self._graph.placeholder("num_rows")
        self._inputs = [self._graph.placeholder(f"input_{number}") for number in range(4)]
        self._last_given = self._inputs[-1]
        self._nodes: list[fx.Node] = []

    def build(self) -> tuple[Callable[..., torch.Tensor], list[Any]]:
        """Return the function of (number of rows, inputs, constants), and the constants."""
        operations = self._first.operations, self._second.operations
        if len(operations[0]) != len(operations[1]):
            raise NotOneGraphError("its length follows the number of rows")
        for one, other in zip(*operations, strict=True):
            args = self._same(one.args, other.args)
            if isinstance(one.function, torch._ops.OpOverload) and one.function is other.function:
                node = self._graph.call_function(_bound(one), args, self._same(one.kwargs, other.kwargs))
            else:  # a kernel of ours
                node = self._graph.call_function(operator.call, (self._same(one.function, other.function), *args))
            self._nodes.append(node)
        self._graph.output(self._same(*self._outs))
        return fx.GraphModule(nn.Module(), self._graph).forward, self._constants

    def _same(self, one: Any, other: Any) -> Any:
        """Return what stands for an argument of both recordings."""
        place = self._first.places.get(id(one))
        if place is not None:
            if place != self._second.places.get(id(other)):
                raise NotOneGraphError("its operations follow the number of rows")
            return self._at(place)
        if type(one) is not type(other):
            raise NotOneGraphError(f"{one!r} is {other!r} with another number of rows")
        if isinstance(one, (tuple, list)) and len(one) == len(other):
            return type(one)(map(self._same, one, other))
        if isinstance(one, Mapping) and one.keys() == other.keys():
            return {name: self._same(value, other[name]) for name, value in one.items()}
        if isinstance(one, torch.Tensor):
            is_same = one is other or (one.shape == other.shape and torch.equal(one, other))
        else:
            is_same = one == other
        if is_same:
            is_plain = one is None or isinstance(one, fx.node.base_types)
            return one if is_plain and not isinstance(one, torch.Tensor) else self._constant(one)
        factor = one // _RECORDED[0] if isinstance(one, int) else 0
        if (one, other) == tuple(factor * num_rows for num_rows in _RECORDED):
            return self._times_rows(factor)
        raise NotOneGraphError(f"{one!r} is {other!r} with another number of rows")

    def _times_rows(self, factor: int) -> fx.Node:
        return self._num_rows if factor == 1 else self._graph.call_function(operator.mul, (self._num_rows, factor))

    def _at(self, place: int | Place) -> fx.Node:
        if isinstance(place, int):
            return self._inputs[place]
        number, which = place
        node = self._nodes[number]
        return node if which is None else self._graph.call_function(operator.getitem, (node, which))

    def _constant(self, value: Any) -> fx.Node:
        with self._graph.inserting_after(self._last_given):
            self._last_given = self._graph.placeholder(f"constant_{len(self._constants)}")
        self._constants.append(value)
        return self._last_given
