"""transformers and PEFT, by one of the ways in `tests.bench.peers`: `of_transformers.py stacked|continuous|peft`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from loop import Request, Worker
from safetensors.torch import load_file

from tests.bench.peers import ContinuousBatching, PeftOneAtATime, StackedEmbeddings, plain_model

MAX_ROWS = 64


class Stacked:
    """Static batches; rows of one length make a batch."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._way = StackedEmbeddings(plain_model(Path(model)), MAX_ROWS)
        self._prompts: dict[str, torch.Tensor] = {}

    def take_prompts(self, files: dict[str, str]) -> None:
        """Keep the embeddings."""
        self._prompts = {name: load_file(file)["prompt_embeddings"] for name, file in files.items()}

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer all at once."""
        prompts = [self._prompts[request["prompt"]] for request in requests if request["prompt"] is not None]
        (max_tokens,) = {request["max_tokens"] for request in requests}
        texts = [tuple(request["ids"]) for request in requests]
        return self._way.run(prompts or None, texts, max_tokens)[1]


class Continuous:
    """Token ids alone."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = plain_model(Path(model))

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer all at once; the batch is `concurrency` rows, of which each call gives that many."""
        (max_tokens,) = {request["max_tokens"] for request in requests}
        way = ContinuousBatching(self._model, len(requests))
        return way.run([tuple(request["ids"]) for request in requests], max_tokens)[1]


class Peft:
    """One request after another, each under its adapter."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = plain_model(Path(model))
        self._plain = StackedEmbeddings(self._model, 1)
        self._ways: dict[str, tuple[PeftOneAtATime, int]] = {}

    def take_prompts(self, files: dict[str, str]) -> None:
        """Make an adapter of each; PEFT keeps the adapters of one kind in one model."""
        tensors = {name: next(iter(load_file(file).values())) for name, file in files.items()}
        self._ways.clear()
        for dims in (2, 5):
            own = {name: tensor for name, tensor in tensors.items() if tensor.ndim == dims}
            if own:
                way = PeftOneAtATime(self._model, list(own.values()))
                self._ways |= {name: (way, number) for number, name in enumerate(own)}

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer one after the other."""
        answers = []
        for request in requests:
            text, count = tuple(request["ids"]), request["max_tokens"]
            if request["prompt"] is None:
                answers += self._plain.run(None, [text], count)[1]
            else:
                way, number = self._ways[request["prompt"]]
                answers.append(way.answer(number, text, count))
        return answers


if __name__ == "__main__":
    Worker({"stacked": Stacked, "continuous": Continuous, "peft": Peft}[sys.argv[1]]).serve()
