"""Numbers between the host and the device, without waiting for anything that the device does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Send numbers: a copy from pinned memory queues behind what the device has to do, and the caller goes on."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Fetched:
    """Numbers on their way to the host: asked for when they are computed, read later."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._is_here: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._is_here = torch.cuda.Event()
            self._is_here.record(torch.cuda.current_stream(values.device))

    def read(self) -> Any:
        """Wait for them, and return them as lists."""
        if self._is_here is not None:
            self._is_here.synchronize()
        return self._values.tolist()


class Staging:
    """Tensors on their way to a device beside what it computes: from pinned memory, over a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return it on the device: what was begun goes on meanwhile, what is begun from here on waits for it."""
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self._device)
        pinned, current = tensor.pin_memory(), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        there.record_stream(current)
        return there
