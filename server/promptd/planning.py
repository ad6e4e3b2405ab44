"""How much fits where: a model, its prompts and its texts in so much memory, on so many servers. Loads no weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REDIS_BYTES_PER_PROMPT = 3600
"""Records, index and events of one published prompt, without its file; measured with Redis 7.0."""
SAMPLING_BYTES_PER_LOGIT = 12
"""float32 logits, their sorted copy, and the probabilities."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on."""

    num_weights: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_number: int
    """Of the serving dtype."""

    @property
    def weight_bytes(self) -> int:
        """The frozen weights."""
        return self.num_weights * self.bytes_per_number

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, or of one virtual token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_number


@dataclass(frozen=True, slots=True)
class Plan:
    """One server's memory, and what all servers hold together. All sizes in bytes."""

    shape: ModelShape
    gpu_bytes: int
    step_bytes: int
    text_bytes: int
    num_prompts: int
    prompt_tokens: int

    @property
    def prompt_bytes(self) -> int:
        """One resident prompt."""
        return self.prompt_tokens * self.shape.kv_bytes_per_token

    @property
    def free_bytes(self) -> int:
        """What is left for prompts; negative where not even model and texts fit."""
        return self.gpu_bytes - self.shape.weight_bytes - self.step_bytes - self.text_bytes

    @property
    def num_resident(self) -> int:
        """Prompts that one server keeps on its device."""
        return max(0, min(self.num_prompts, self.free_bytes // self.prompt_bytes))

    @property
    def file_bytes(self) -> tuple[int, int]:
        """A soft prompt's float32 file and a prefix's, in the store."""
        prefix = self.prompt_tokens * 2 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim * 4
        return self.prompt_tokens * self.shape.hidden_size * 4, prefix

    @property
    def servers_for_all(self) -> int | None:
        """Servers that hold every prompt once, routed by prompt; None where one cannot hold any."""
        return math.ceil(self.num_prompts / self.num_resident) if self.num_resident else None


def read_shape(folder: Path, sizes: tuple[int, int, int, int, int], bytes_per_number: int) -> ModelShape:
    """Count the weights in a folder's safetensors headers. `sizes`: hidden, layers, K/V heads, head_dim, vocabulary."""
    num_weights = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        num_weights += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    return ModelShape(num_weights, *sizes, bytes_per_number)


def make_plan(
    shape: ModelShape, *, gpu_bytes: int, num_prompts: int, prompt_tokens: int, num_rows: int, row_tokens: int
) -> Plan:
    """Divide a device's memory. `num_rows` rows of `row_tokens` tokens of text run at once."""
    step_bytes = num_rows * shape.vocab_size * SAMPLING_BYTES_PER_LOGIT + gpu_bytes // 20
    return Plan(
        shape, gpu_bytes, step_bytes, num_rows * row_tokens * shape.kv_bytes_per_token, num_prompts, prompt_tokens
    )


def zipf_hit_ratio(num_prompts: int, num_resident: int, *, exponent: float = 1.0) -> float:
    """Share of requests that find their prompt in a least-recently-used cache, for Zipf traffic.

    Che's approximation (Che, Tung, Wang 2002): a prompt is there if it was asked within the time in which the cache
    turns over once.
    """
    if num_resident >= num_prompts:
        return 1.0
    if num_resident <= 0:
        return 0.0
    shares = np.arange(1, num_prompts + 1, dtype=np.float64) ** -exponent
    shares /= shares.sum()
    low, high = 0.0, 1.0
    while (1 - np.exp(-shares * high)).sum() < num_resident:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < num_resident else (low, middle)
    return float((shares * (1 - np.exp(-shares * high))).sum())


def fleet_hit_ratios(
    num_prompts: int, num_resident: int, num_servers: int, *, exponent: float = 1.0
) -> tuple[float, float]:
    """Hit ratios of so many servers: requests spread by load, and requests routed by prompt.

    Spread, every server sees the whole traffic. Routed, each sees its share of the prompts, drawn at random as a hash
    does, so that together they are one cache.
    """
    together = min(num_prompts, num_resident * num_servers)
    return (
        zipf_hit_ratio(num_prompts, num_resident, exponent=exponent),
        zipf_hit_ratio(num_prompts, together, exponent=exponent),
    )
