"""OpenVINO GenAI's continuous batching on the CPU; token ids alone. `of_openvino.py f32|bf16` serves in that dtype,
`of_openvino.py convert MODEL OUT` exports the model with optimum."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from loop import Request, Worker

MAX_ROWS = 64


class OpenVino:
    """`ContinuousBatchingPipeline`, stepped by us."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = MAX_ROWS
        scheduler.max_num_batched_tokens = 2048
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": sys.argv[1],
            "KV_CACHE_PRECISION": sys.argv[1],
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._running: dict[int, Any] = {}
        self._left: dict[int, int] = {}

    def add(self, number: int, request: Request) -> None:
        """Take a request."""
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([request["ids"]], dtype=np.int64))
        self._running[number] = self._pipeline.add_request(number, ids, config)
        self._left[number] = request["max_tokens"]

    def step(self) -> list[tuple[int, list[int]]]:
        """Return the new tokens."""
        self._pipeline.step()
        made = []
        for number, handle in list(self._running.items()):
            if handle.can_read():
                ids = [token for output in handle.read().values() for token in output.generated_ids]
                made.append((number, ids))
                self._left[number] -= len(ids)
            if self._left[number] <= 0:
                del self._running[number], self._left[number]
        return made


def convert(model: Path, out: Path) -> None:
    """Export with float32 weights."""
    from float32 import write_float32
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_float32(model, Path(folder))
        exported = OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, compile=False)
        exported.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(out)
    import openvino
    from openvino_tokenizers import convert_tokenizer

    for name, made in zip(
        ("openvino_tokenizer.xml", "openvino_detokenizer.xml"),
        convert_tokenizer(tokenizer, with_detokenizer=True),
        strict=True,
    ):
        openvino.save_model(made, out / name)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        Worker(OpenVino).serve()
