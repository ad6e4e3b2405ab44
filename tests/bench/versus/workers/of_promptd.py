"""promptd's engine: prompts of any kind, rows of different prompts in one step."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import promptd.modeling.heavy_imports  # noqa: F401, as in `promptd serve`  # isort: skip
import torch
from loop import Request, Worker
from promptd_store import PromptArtifact, decode

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, RequestOutput, SamplingParams
from promptd.modeling import load_model

MAX_ROWS = 64
KV_BYTES = 1 << 29
"""Of texts, and again of prompts: 1 GiB together, as for the others."""


class PromptdEngine:
    """Stepped in the caller's thread."""

    def __init__(self, model: str, threads: int, **settings: str) -> None:
        torch.set_num_threads(threads)
        config = EngineConfig(max_num_seqs=MAX_ROWS, kv_cache_bytes=KV_BYTES, prompt_cache_bytes=KV_BYTES)
        self._model = load_model(Path(model), **settings)
        self._engine = Engine(self._model, config)
        self._prompts: dict[str, PromptArtifact] = {}

    def take_prompts(self, files: dict[str, str]) -> None:
        """Keep them in the host's memory; their first request makes them resident."""
        self._prompts = {name: decode(Path(file).read_bytes(), self._model.spec) for name, file in files.items()}

    def add(self, number: int, request: Request) -> None:
        """Take a request."""
        params = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
        prompts = () if request["prompt"] is None else (self._prompts[request["prompt"]],)
        self._engine.add_request(GenerateRequest(str(number), tuple(request["ids"]), params, prompts))

    def step(self) -> list[tuple[int, list[int]]]:
        """Return the new tokens."""
        made = []
        for output in self._engine.step():
            if output.error is not None:
                raise output.error
            if isinstance(output, RequestOutput) and output.token_ids:
                made.append((int(output.request_id), list(output.token_ids)))
        return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    Worker(partial(PromptdEngine, **vars(parser.parse_args()))).serve()
