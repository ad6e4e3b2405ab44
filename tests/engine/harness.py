"""Drives a real engine over a tiny model and answers the same requests with transformers' own forward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from promptd_store import PromptArtifact, PromptKind, encode
from transformers import AutoModelForCausalLM

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine, Output
from promptd.engine.request import GenerateRequest, SamplingParams
from promptd.modeling import FrozenModel, load_model
from promptd.modeling.reference import ReferenceRow, Segment

TOLERANCE = 1e-4


@functools.cache
def frozen(folder: Path, *, strict: bool = False, quantization: str = "none") -> FrozenModel:
    """The model under test, loaded once."""
    return load_model(folder, strict=strict, quantization=quantization)


@functools.cache
def oracle(folder: Path) -> torch.nn.Module:
    """The same weights under transformers' eager attention, untouched by promptd."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


@functools.cache
def library(folder: Path) -> tuple[PromptArtifact, ...]:
    """Distinct prompts of ragged sizes for one model: four soft prompts, four prefixes, two texts."""
    model = frozen(folder)
    spec = model.spec
    generator = torch.Generator().manual_seed(7)
    prompts = []
    for count in (1, 3, 8, 17):
        ids = torch.randint(0, spec.vocab_size, (count,), generator=generator)
        noise = 0.3 * torch.randn(count, spec.hidden_size, generator=generator)
        prompts.append(encode("soft", model.embed(ids) + noise, base_fingerprint=spec.fingerprint))
    for count in (1, 2, 7, 20):
        shape = (spec.num_layers, 2, spec.num_kv_heads, count, spec.head_dim)
        prompts.append(encode("prefix", 2 * torch.randn(shape, generator=generator)))
    prompts += [encode("text", text=text) for text in ("the quick brown fox", "weather")]
    return tuple(prompts)


def chain_segments(model: FrozenModel, prompts: Sequence[PromptArtifact]) -> list[Segment]:
    """The same chain for the oracle."""
    segments: list[Segment] = []
    for prompt in prompts:
        if prompt.kind is PromptKind.TEXT:
            ids = model.encode(prompt.manifest.text or "", add_special_tokens=False)
            segments.append(("text", torch.tensor(ids)))
        else:
            segments.append((prompt.kind.value, next(iter(prompt.tensors.values()))))
    return segments


@dataclass
class Case:
    """One request of a scenario."""

    prompts: tuple[PromptArtifact, ...]
    token_ids: tuple[int, ...]
    params: SamplingParams
    arrives: int = 0
    aborts: int | None = None
    outputs: list[Output] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """What the engine generated."""
        return [token for output in self.outputs for token in output.token_ids]  # type: ignore[union-attr]


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy, whatever the model says about the end."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def make_engine(
    folder: Path,
    *,
    num_blocks: int = 64,
    prompt_tokens: int = 512,
    strict: bool = False,
    quantization: str = "none",
    runs_ahead: bool | None = None,
    **limits: int | bool | None,
) -> Engine:
    """An engine whose caches are given in blocks and virtual tokens; a slot read before it was written is a NaN."""
    model = frozen(folder, strict=strict, quantization=quantization)
    slot = model.bytes_per_slot
    block_size = int(limits.get("block_size") or 16)
    config = EngineConfig(
        kv_cache_bytes=num_blocks * block_size * slot,
        prompt_cache_bytes=prompt_tokens * slot,
        strict=strict,
        **limits,  # type: ignore[arg-type]
    )
    engine = Engine(model, config, runs_ahead=runs_ahead)
    for stored in (engine.pool.keys, engine.pool.values):
        stored.fill_(torch.nan)
    return engine


def run(engine: Engine, cases: Sequence[Case], *, max_steps: int = 2000) -> None:
    """Submit each case at its step, abort at its step, check every pool after every step."""
    by_id = {f"r{number}": case for number, case in enumerate(cases)}
    for at in range(max_steps):
        for request_id, case in by_id.items():
            if case.arrives == at:
                engine.add_request(GenerateRequest(request_id, case.token_ids, case.params, case.prompts))
            if case.aborts == at:
                engine.abort(request_id)
        for output in engine.step():
            by_id[output.request_id].outputs.append(output)
        engine.check_integrity()
        if not engine.has_work and at >= max(case.arrives for case in cases):
            return
    raise AssertionError("the engine never finished")


def assert_matches_oracle(folder: Path, case: Case) -> None:
    """Tokens are those that the oracle would take behind the same beginning, one forward pass for the whole row."""
    if case.tokens:
        row = ReferenceRow(oracle(folder), chain_segments(frozen(folder), case.prompts))  # type: ignore[arg-type]
        logits = row.extend([*case.token_ids, *case.tokens[:-1]])[-len(case.tokens) :]
        assert_greedy(case.tokens, logits, [prompt.kind.value for prompt in case.prompts])


def assert_greedy(tokens: Sequence[int], logits: torch.Tensor, told: object) -> None:
    """Each token is the likeliest of its logits `[num_tokens, vocab_size]`, or within the tolerance of it."""
    for at, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        limit = 2 * TOLERANCE * row.abs().max()
        assert row.max() - row[token] <= limit, f"{told}: token {at} is {token}, not {int(row.argmax())}"
