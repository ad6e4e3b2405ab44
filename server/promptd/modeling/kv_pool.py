"""K/V storage on the device: one slot per token, every layer; owned by the engine, written by attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from promptd.modeling.decode_kernel import decode_kernel
from promptd.modeling.shared_spans import Span
from promptd.modeling.transfer import Staging


class KVPool:
    """Keys and values of `num_slots` tokens for every layer.

    Storage is allocated once and not zeroed when it changes hands: a slot is read only after its owner wrote it,
    because attention reads exactly the spans of a row, so what a former owner left behind (a NaN, say) reaches nobody.
    Only what is to be erased is overwritten.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.num_kv_heads = num_kv_heads
        self.bytes_per_slot = kv_bytes_per_token(num_layers, num_kv_heads, head_dim, dtype)
        # A head's keys lie side by side: attention reads head by head, and only long runs stream well from memory.
        shape = (num_layers, num_kv_heads, num_slots, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._kernel = decode_kernel(dtype) if device.type == "cpu" else None
        self.stage = Staging(device)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `[1, num_kv_heads, num_tokens, head_dim]` at `slots` (`[num_tokens]`, int64)."""
        for stored, tokens in ((self.keys[layer], key[0]), (self.values[layer], value[0])):
            if self._kernel is None:
                stored.index_copy_(1, slots, tokens)
            else:
                self._kernel.store(stored, slots, tokens)

    def heads(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one layer's keys and values as attention reads them, `[1, num_kv_heads, num_slots, head_dim]` each."""
        return self.keys[None, layer], self.values[None, layer]

    def load_prefix(self, spans: Sequence[Span], prefix: torch.Tensor) -> None:
        """Copy a learned prefix `[num_layers, 2, num_kv_heads, num_tokens, head_dim]` into `spans`, any float dtype.

        It may have fewer layers than the pool: those of a shallower stack.
        """
        prefix, layers = self.stage(prefix), prefix.shape[0]
        done = 0
        for start, length in spans:
            part = prefix[:, :, :, done : done + length]  # [num_layers, 2, num_kv_heads, length, head_dim]
            self.keys[:layers, :, start : start + length].copy_(part[:, 0])
            self.values[:layers, :, start : start + length].copy_(part[:, 1])
            done += length

    def clear(self, spans: Sequence[Span]) -> None:
        """Overwrite slots whose content must be gone."""
        for start, length in spans:
            self.keys[:, :, start : start + length].zero_()
            self.values[:, :, start : start + length].zero_()


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
