"""vLLM on the CPU: `prompt_embeds` carry a soft prompt and the embedded text. `of_vllm.py float32|bfloat16` serves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from loop import Request, Worker

MAX_ROWS = 64


class Vllm:
    """`LLMEngine`, stepped by us; greedy, no text is made of the tokens."""

    def __init__(self, model: str, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists():  # as its documentation advises; for the process that it starts
            os.environ.setdefault("LD_PRELOAD", str(openmp))
        from safetensors.torch import load_file
        from vllm import LLM

        self._llm = LLM(
            model=model,
            dtype=sys.argv[1],
            max_num_seqs=MAX_ROWS,
            enable_prompt_embeds=True,
            disable_log_stats=True,
            seed=0,
        )
        self._load = load_file
        self._prompts: dict[str, Any] = {}
        self._sent: dict[str, int] = {}
        self._table = _embedding_table(model)

    def take_prompts(self, files: dict[str, str]) -> None:
        """Keep the embeddings."""
        self._prompts = {name: self._load(file)["prompt_embeddings"] for name, file in files.items()}

    def add(self, number: int, request: Request) -> None:
        """Take a request; the client's part of the work, joining prompt and embedded text, is done here."""
        import torch
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        count = request["max_tokens"]
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        params.output_kind = RequestOutputKind.DELTA
        if request["prompt"] is None:
            prompt: dict[str, Any] = {"prompt_token_ids": request["ids"]}
        else:
            text = self._table[torch.tensor(request["ids"])]
            prompt = {"prompt_embeds": torch.cat([self._prompts[request["prompt"]], text])}
        self._llm.llm_engine.add_request(str(number), prompt, params)

    def step(self) -> list[tuple[int, list[int]]]:
        """Return the new tokens."""
        outputs = self._llm.llm_engine.step()
        return [(int(output.request_id), list(output.outputs[0].token_ids)) for output in outputs]


def _embedding_table(model: str) -> Any:
    from safetensors import safe_open

    with safe_open(Path(model) / "model.safetensors", "pt") as file:
        (name,) = [each for each in file.keys() if each.endswith(("wte.weight", "embed_tokens.weight"))]  # noqa: SIM118
        return file.get_tensor(name).float()


if __name__ == "__main__":
    Worker(Vllm).serve()
