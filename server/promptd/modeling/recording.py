"""Notes what a forward pass does, operation by operation: torch's own, and kernels of ours as one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_T = TypeVar("_T")


class NotOneGraphError(Exception):
    """Passes of this model are no single list of operations; the text says why."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call, with what went in and came out."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Place = tuple[int, int | None]
"""Number of an operation and of its output, where it has several."""


class Recording(TorchDispatchMode):
    """Notes every operation between the inputs and the output."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.places: dict[int, int | Place] = {id(value): number for number, value in enumerate(inputs)}
        self._kept: list[Any] = [inputs]  # so that ids stay theirs
        self.is_inside = False
        """Whether a kernel of ours runs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one of torch's operations."""
        if func is torch.ops.aten.lift_fresh.default:  # a tensor made of numbers: what is done to it lasts one pass
            func = torch.ops.aten.clone.default
        out = func(*args, **(kwargs or {}))
        if not self.is_inside:
            self._note(Operation(func, args, kwargs or {}), out)
        return out

    def call(self, function: Callable[..., _T], args: tuple[Any, ...]) -> _T:
        """Run one of ours; what it asks of torch is its own affair."""
        self.is_inside = True
        try:
            out = function(*args)
        finally:
            self.is_inside = False
        self._note(Operation(function, args, {}), out)
        return out

    def _note(self, operation: Operation, out: Any) -> None:
        number = len(self.operations)
        self.operations.append(operation)
        self._kept.append((operation, out))
        given = {id(value) for value in tree_leaves((operation.args, dict(operation.kwargs)))}
        for place, value in enumerate(out) if isinstance(out, (tuple, list)) else [(None, out)]:
            if isinstance(value, torch.Tensor):
                if id(value) not in given:  # what was changed in place stays what it was
                    self.places[id(value)] = number, place
            elif value is not None:
                raise NotOneGraphError(f"{operation.function} looks at numbers")


class _Unread(TorchFunctionMode):
    """Refuses what takes numbers out of tensors past torch's operations."""

    def __init__(self, noted: Recording) -> None:
        super().__init__()
        self._noted = noted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Pass on all else."""
        if func in _READERS and not self._noted.is_inside:
            raise NotOneGraphError(f"{func.__name__} looks at numbers")
        return func(*args, **(kwargs or {}))


_READERS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


def opaque(function: Callable[..., _T], *args: Any) -> _T:
    """Call what works behind torch's back, a kernel of ours: in a recording it is one operation."""
    noted = _recording.get()
    return function(*args) if noted is None else noted.call(function, args)


@contextmanager
def recording(inputs: Sequence[Any]) -> Iterator[Recording]:
    """Note what happens in a block of this thread, which begins with these inputs."""
    noted = Recording(inputs)
    token = _recording.set(noted)
    try:
        with noted, _Unread(noted):
            yield noted
    finally:
        _recording.reset(token)
