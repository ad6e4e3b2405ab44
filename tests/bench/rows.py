"""Requests for an engine in this process, and the clock around its steps."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from promptd_store import PromptArtifact, encode

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, RequestOutput, SamplingParams
from promptd.modeling import FrozenModel, kv_bytes_per_token
from tests.bench.models import FORWARD_SECONDS

_numbers = itertools.count()
Tokens = tuple[int, ...]


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy; end-of-text does not end."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def fresh_tokens(count: int, vocab_size: int) -> Tokens:
    """Return ids that no cache of this process has seen; every process makes the same ones."""
    rng = random.Random(next(_numbers))
    return tuple(rng.randrange(1, vocab_size) for _ in range(count))


def soft_prompts(count: int, virtual_tokens: int, hidden_size: int) -> list[PromptArtifact]:
    """Make that many new soft prompts."""
    return [encode("soft", 0.1 * torch.randn(virtual_tokens, hidden_size)) for _ in range(count)]


def prefixes(count: int, virtual_tokens: int, model: FrozenModel) -> list[PromptArtifact]:
    """Make that many new prefixes."""
    spec = model.spec
    shape = (spec.num_layers, 2, spec.num_kv_heads, virtual_tokens, spec.head_dim)
    return [encode("prefix", 0.1 * torch.randn(shape)) for _ in range(count)]


def request(token_ids: Tokens, max_tokens: int, *prompts: PromptArtifact) -> GenerateRequest:
    """One greedy request with an id of its own."""
    return GenerateRequest(f"bench-{next(_numbers)}", token_ids, greedy(max_tokens), prompts)


def make_engine(
    model: FrozenModel, *, max_num_seqs: int = 16, text_tokens: int, prompt_tokens: int, prefix_caching: bool = False
) -> Engine:
    """An engine with room for so many tokens of text and of prompts."""
    spec = model.spec
    slot = kv_bytes_per_token(spec.num_layers, spec.num_kv_heads, spec.head_dim, model.dtype)
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=prefix_caching,
        kv_cache_bytes=text_tokens * slot,
        prompt_cache_bytes=prompt_tokens * slot,
    )
    return Engine(model, config)


@dataclass
class Outcome:
    """What running a set of requests gave."""

    seconds: float
    tokens: dict[str, list[int]] = field(default_factory=dict)
    cached_tokens: dict[str, int] = field(default_factory=dict)
    decode_steps: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, seconds of these inside the forward pass) of the steps in which every row made one token."""

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.tokens.values()))


def run(engine: Engine, requests: Sequence[GenerateRequest], *, full_rows: int = 0) -> Outcome:
    """Queue all requests, step until they are done; steps of `full_rows` decoding rows are timed apart."""
    outcome = Outcome(0.0, {one.request_id: [] for one in requests})
    began = time.perf_counter()
    for one in requests:
        engine.add_request(one)
    while engine.has_work:
        FORWARD_SECONDS.clear()
        before = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - before
        for output in outputs:
            if output.error is not None:
                raise output.error
            if isinstance(output, RequestOutput):
                outcome.tokens[output.request_id] += output.token_ids
                outcome.cached_tokens[output.request_id] = output.num_cached_tokens
        if full_rows and len(outputs) == full_rows == engine.stats().last_step_num_tokens:
            outcome.decode_steps.append((seconds, sum(FORWARD_SECONDS)))
    outcome.seconds = time.perf_counter() - began
    return outcome


def first_token_seconds(engine: Engine, one: GenerateRequest) -> float:
    """Time from handing a request in to its first token, on an idle engine."""
    began = time.perf_counter()
    engine.add_request(one)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began
