"""What is asked: the same token ids and prompts of every contender in a round, other texts in the next round."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from promptd_store import BaseModelSpec, encode

from promptd.bench import Lengths
from tests.bench.scale import Scale
from tests.bench.versus.contenders import Contender

SPREAD = 0.1
"""Standard deviation of made-up prompts."""
Requests = list[dict[str, Any]]
_ONE = Lengths(1, 1)


@dataclass(frozen=True)
class Workload:
    """So many requests, so long, under prompts of these kinds in turn."""

    name: str
    title: str
    num_requests: int
    input_tokens: Lengths
    output_tokens: Lengths
    concurrency: int
    kinds: tuple[str, ...] = ("none",)
    virtual_tokens: Lengths = _ONE
    shared_tokens: int = 0
    """Text that all rows begin with; 0 for none."""
    has_new_prompts: bool = False
    """Every round has prompts that nobody has seen."""
    counts_input: bool = False
    """The rate is of the tokens read, too."""

    def suits(self, contender: Contender) -> bool:
        """Whether the contender can answer this."""
        has_prompts = set(self.kinds) != {"none"}
        is_even = self.virtual_tokens.low == self.virtual_tokens.high and len(self.kinds) == 1
        fits_batches = contender.is_continuous or (is_even and not self.shared_tokens)
        if not contender.mixes:
            return has_prompts and set(self.kinds) <= contender.kinds
        return fits_batches and set(self.kinds) <= contender.kinds

    def prompts(self, spec: BaseModelSpec, folder: Path, number: int) -> dict[str, str]:
        """Return the files of a round's prompts by name; made where they are not there."""
        of = folder / (f"{self.name}-{number}" if self.has_new_prompts else self.name)
        of.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(random.Random(str(of.name)).randrange(1 << 40))
        files = {}
        for at in range(self.num_requests):
            kind, length = self.kinds[at % len(self.kinds)], self.virtual_tokens.spread(at, self.num_requests)
            shape = (
                (length, spec.hidden_size)
                if kind == "soft"
                else (spec.num_layers, 2, spec.num_kv_heads, length, spec.head_dim)
            )
            if kind != "none":
                tensor = SPREAD * torch.randn(shape, generator=generator)
                name = f"{of.name}-{at}"
                files[name] = str((of / f"{name}.safetensors").resolve())
                Path(files[name]).write_bytes(encode(kind, tensor).content)
        return files

    def requests(self, vocab_size: int, prompts: dict[str, str], number: int) -> Requests:
        """Return a round's requests; prompt number i belongs to the i-th request that has one."""
        rng = random.Random(f"{self.name}:{number}")
        shared = random.Random(f"{self.name}:shared")
        beginning = [shared.randrange(1, vocab_size) for _ in range(self.shared_tokens)]
        names, asked = iter(prompts), []
        for at in range(self.num_requests):
            ids = beginning + [rng.randrange(1, vocab_size) for _ in range(self.input_tokens.draw(rng))]
            prompt = None if self.kinds[at % len(self.kinds)] == "none" else next(names)
            asked.append({"ids": ids, "max_tokens": self.output_tokens.draw(rng), "prompt": prompt, "at": 0.0})
        return asked

    def num_tokens(self, requests: Requests) -> int:
        """Tokens that the rate counts."""
        return sum(each["max_tokens"] + self.counts_input * len(each["ids"]) for each in requests)


def workloads(scale: Scale, model: Path) -> dict[str, Workload]:
    """Return all that fit the model's positions, smaller for a large model."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    positions = config.get("n_positions") or config["max_position_embeddings"]
    count, rows = scale.num_requests, scale.max_num_seqs
    if model.name in scale.slow_models:
        count = min(count, rows)
    text, answer = Lengths(scale.input_tokens, scale.input_tokens), Lengths(scale.output_tokens, scale.output_tokens)
    short = Lengths(scale.short_tokens, scale.short_tokens)
    virtual, mixed = Lengths(scale.virtual_tokens, scale.virtual_tokens), Lengths(*scale.mixed_virtual_tokens)
    long = Lengths(scale.long_tokens, scale.long_tokens)
    w0 = Workload("w0", "no prompts", count, text, answer, rows)
    w1 = replace(w0, name="w1", title="a soft prompt each", kinds=("soft",), virtual_tokens=virtual)
    shared = min(scale.shared_tokens, positions - 2 * scale.short_tokens)
    every = (
        w0,
        w1,
        replace(w1, name="w1-new", title="the same, prompts never seen", has_new_prompts=True),
        replace(w1, name="w1p", title="a prefix each", kinds=("prefix",)),
        replace(
            w1,
            name="w1m",
            title=f"soft, prefix or none in turn, {mixed} tokens",
            kinds=("soft", "prefix", "none"),
            virtual_tokens=mixed,
        ),
        replace(w0, name="w2", title="one row alone", num_requests=1, concurrency=1),
        replace(
            w0,
            name="long",
            title=f"{long} tokens in, tokens read and written",
            num_requests=max(2, rows // 2),
            input_tokens=long,
            output_tokens=short,
            concurrency=max(2, rows // 2),
            counts_input=True,
        ),
        replace(
            w0,
            name="shared",
            title=f"{scale.shared_rows} rows behind one text of {shared} tokens",
            num_requests=scale.shared_rows,
            concurrency=scale.shared_rows,
            input_tokens=short,
            output_tokens=short,
            shared_tokens=shared,
        ),
    )
    return {each.name: each for each in every}
