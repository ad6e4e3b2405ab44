"""`promptd.LLM`: the engine without a server."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from promptd_store import PromptArtifact, read_prompt, render_template

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import (
    FinishReason,
    GenerateRequest,
    Output,
    PoolOutput,
    PoolRequest,
    Request,
    RequestOutput,
    SamplingParams,
    ScoreOutput,
    ScoreRequest,
    TokenLogprob,
)
from promptd.modeling import FrozenModel, load_model

Prompt = PromptArtifact | str | Path
"""An artifact, a native or PEFT safetensors file, or a PEFT folder."""
Input = str | Sequence[int] | Mapping[str, str]
"""Text, token ids (used as given), or the named fields of the prompt's template."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_virtual_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token, where they were asked for."""


class LLM:
    """One frozen model and an engine, in this process.

    llm = promptd.LLM("path/to/model")
    llm.generate(["Hello", "Hello"], prompts=["user-a.safetensors", "user-b.safetensors"])
    """

    def __init__(self, model: str | Path | FrozenModel, *, config: EngineConfig | None = None, **load: object) -> None:
        """Load `model` (a folder, a hub id, or a `FrozenModel`); `load` goes to `promptd.modeling.load_model`."""
        self.model = model if isinstance(model, FrozenModel) else load_model(model, **load)  # type: ignore[arg-type]
        self.engine = Engine(self.model, config)

    def load_prompt(self, prompt: Prompt) -> PromptArtifact:
        """Read a prompt from a file or PEFT folder, with every check of an upload."""
        if isinstance(prompt, PromptArtifact):
            return prompt
        return read_prompt(prompt, self.model.spec)

    def generate(
        self,
        inputs: Sequence[Input],
        prompts: Sequence[Prompt | Sequence[Prompt] | None] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[Completion]:
        """Continue every input under its own prompt (None: the bare model; a sequence: a chain), in one mixed batch.

        `begun` are tokens with which each answer has begun already. Raises the first request's typed error, if any.
        """
        chains = self._chains(inputs, prompts)
        each = [params or SamplingParams()] * len(inputs) if not isinstance(params, Sequence) else list(params)
        requests = [
            GenerateRequest(str(uuid.uuid4()), self._tokens(text, chain), own, chain, begun_token_ids=tuple(tokens))
            for text, chain, own, tokens in zip(inputs, chains, each, begun or [()] * len(inputs), strict=True)
        ]
        outputs = self._run(requests)
        return [_completion(outputs[request.request_id]) for request in requests]

    def score(
        self,
        inputs: Sequence[Input],
        candidates: Sequence[str],
        prompts: Sequence[Prompt | Sequence[Prompt] | None] | None = None,
    ) -> list[tuple[float, ...]]:
        """Return each input's log-probabilities (nats) of the candidate continuations."""
        chains = self._chains(inputs, prompts)
        encoded = tuple(tuple(self.model.encode(text, add_special_tokens=False)) for text in candidates)
        requests = [
            ScoreRequest(str(uuid.uuid4()), self._tokens(text, chain), encoded, chain)
            for text, chain in zip(inputs, chains, strict=True)
        ]
        outputs = self._run(requests)
        return [
            output.logprobs
            for request in requests
            for output in outputs[request.request_id]
            if isinstance(output, ScoreOutput)
        ]

    def pool(
        self,
        inputs: Sequence[Input],
        kind: Literal["classes", "embedding"],
        prompts: Sequence[Prompt | Sequence[Prompt] | None] | None = None,
    ) -> list[tuple[float, ...]]:
        """Return each input's scores (logits) by a classification head, or its embedding."""
        chains = self._chains(inputs, prompts)
        requests = [
            PoolRequest(str(uuid.uuid4()), self._tokens(text, chain), kind, chain)
            for text, chain in zip(inputs, chains, strict=True)
        ]
        outputs = self._run(requests)
        return [
            output.values
            for request in requests
            for output in outputs[request.request_id]
            if isinstance(output, PoolOutput)
        ]

    def _chains(
        self, inputs: Sequence[Input], prompts: Sequence[Prompt | Sequence[Prompt] | None] | None
    ) -> list[tuple[PromptArtifact, ...]]:
        chains: list[tuple[PromptArtifact, ...]] = []
        for prompt in prompts if prompts is not None else [None] * len(inputs):
            if prompt is None:
                chains.append(())
            elif isinstance(prompt, (PromptArtifact, str, Path)):
                chains.append((self.load_prompt(prompt),))
            else:
                chains.append(tuple(self.load_prompt(part) for part in prompt))
        return chains

    def _tokens(self, text: Input, chain: tuple[PromptArtifact, ...]) -> tuple[int, ...]:
        template = chain[-1].manifest.template if chain else None
        if isinstance(text, Mapping):
            text = render_template(template or "{text}", text)
        elif isinstance(text, str) and template is not None:
            text = render_template(template, {"text": text})
        if not isinstance(text, str):
            return tuple(text)
        special = self.model.takes_special_tokens(chain)
        return tuple(self.model.encode(text, add_special_tokens=special))

    def _run(self, requests: Sequence[Request]) -> dict[str, list[Output]]:
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        try:
            todo = list(reversed(requests))
            while todo or self.engine.has_work:
                while todo and len(self.engine.scheduler.waiting) < self.engine.config.max_queue:
                    self.engine.add_request(todo.pop())
                for output in self.engine.step():
                    if output.error is not None:
                        raise output.error
                    outputs[output.request_id].append(output)
        finally:
            for request in requests:
                self.engine.abort(request.request_id)
        return outputs


def _completion(outputs: list[Output]) -> Completion:
    parts = [output for output in outputs if isinstance(output, RequestOutput)]
    last = parts[-1]
    return Completion(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=last.finish_reason or FinishReason.ABORT,
        num_prompt_tokens=last.num_prompt_tokens,
        num_virtual_tokens=last.num_virtual_tokens,
        logprobs=tuple(one for part in parts for one in part.logprobs),
    )
