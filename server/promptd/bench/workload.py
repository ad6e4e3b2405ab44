"""What a benchmark asks: prompts of mixed kinds and sizes, and requests that name them. The same for the same seed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from promptd_store import BaseModelSpec, PromptArtifact

KINDS = ("soft", "prefix", "text", "none")
SAFE_VOCAB_SIZE = 256
"""Ids below this exist in every byte-level vocabulary; used where the model's own size is not known."""

_FIRST_PLAIN_ID = 3  # special tokens usually come first
_SOFT_STD, _PREFIX_STD = 0.05, 0.1  # far inside the bounds of an upload; nothing but the sizes counts here
_WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "on", "with", "as", "by", "at", "from", "this", "which")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of lengths in tokens, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read `64` or `16-128`; raises `ValueError` saying what is wrong."""
        low, separator, high = text.partition("-")
        try:
            lengths = cls(int(low), int(high) if separator else int(low))
        except ValueError:
            raise ValueError(f"{text!r} is neither a number nor a range such as 16-128") from None
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r}: lengths must be at least 1 and must not fall")
        return lengths

    def spread(self, index: int, count: int) -> int:
        """Return the `index`-th of `count` lengths spread evenly over the range."""
        return self.low + (self.high - self.low) * index // max(1, count - 1)

    def draw(self, rng: random.Random) -> int:
        """Return a random length of the range."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What made-up prompts must fit."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of_spec(cls, spec: BaseModelSpec) -> ModelSizes:
        """The sizes of a loaded model."""
        return cls(spec.vocab_size, spec.hidden_size, spec.num_layers, spec.num_kv_heads, spec.head_dim)


@dataclass(frozen=True, slots=True)
class Workload:
    """How much of what is asked in one run."""

    num_requests: int = 64
    num_prompts: int = 16
    kinds: tuple[str, ...] = ("soft", "prefix", "text")
    virtual_tokens: Lengths = Lengths(8, 64)
    input_tokens: Lengths = Lengths(32, 128)
    output_tokens: Lengths = Lengths(32, 64)
    concurrency: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A prompt that requests name; without an artifact it is on the server already; without a name it is none."""

    name: str | None
    kind: str
    artifact: PromptArtifact | None = None


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: greedy, end-of-text ignored, so that its cost is known beforehand."""

    prompt: BenchPrompt
    token_ids: tuple[int, ...]
    max_tokens: int


def make_prompts(workload: Workload, sizes: ModelSizes) -> list[BenchPrompt]:
    """Make `num_prompts` distinct prompts, the kinds in turn, their lengths spread evenly; their names are new."""
    import torch
    from promptd_store import encode

    generator = torch.Generator().manual_seed(workload.seed)
    rng = random.Random(workload.seed)
    session = uuid.uuid4().hex[:8]  # two benchmarks on one server do not delete each other's prompts
    prompts = []
    for number in range(workload.num_prompts):
        kind = workload.kinds[number % len(workload.kinds)]
        length = workload.virtual_tokens.spread(number, workload.num_prompts)
        if kind == "none":
            prompts.append(BenchPrompt(None, kind))
            continue
        if kind == "text":
            artifact = encode(kind, text=f"{number}: " + " ".join(rng.choices(_WORDS, k=length)))
        else:
            is_soft = kind == "soft"
            shape = (
                (length, sizes.hidden_size)
                if is_soft
                else (sizes.num_layers, 2, sizes.num_kv_heads, length, sizes.head_dim)
            )
            scale = _SOFT_STD if is_soft else _PREFIX_STD
            artifact = encode(kind, scale * torch.randn(shape, generator=generator))
        prompts.append(BenchPrompt(f"bench-{session}-{number}-{kind}", kind, artifact))
    return prompts


def make_requests(
    workload: Workload, prompts: Sequence[BenchPrompt], vocab_size: int, *, run: int
) -> list[BenchRequest]:
    """Make one run's requests: prompts in turn in a shuffled order, fresh token ids for every run."""
    rng = random.Random(f"{workload.seed}:{run}")
    order: list[BenchPrompt] = []
    while len(order) < workload.num_requests:
        order += rng.sample(list(prompts), len(prompts))
    return [
        BenchRequest(
            prompt,
            tuple(rng.randrange(_FIRST_PLAIN_ID, vocab_size) for _ in range(workload.input_tokens.draw(rng))),
            workload.output_tokens.draw(rng),
        )
        for prompt in order[: workload.num_requests]
    ]
