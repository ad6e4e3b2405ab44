"""CTranslate2 on the CPU: static batches of token ids. `of_ctranslate2.py float32|int8` serves,
`of_ctranslate2.py convert MODEL OUT` writes the folder that it loads."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from loop import Request, Worker


class CTranslate2:
    """`Generator.generate_batch`."""

    def __init__(self, model: str, threads: int) -> None:
        compute_type = sys.argv[1]
        self._generator = ctranslate2.Generator(
            model, device="cpu", compute_type=compute_type, intra_threads=threads, inter_threads=1
        )
        self._words: list[str] = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer all at once."""
        (count,) = {request["max_tokens"] for request in requests}
        results = self._generator.generate_batch(
            [[self._words[number] for number in request["ids"]] for request in requests],
            max_batch_size=len(requests),
            max_length=count,
            min_length=count,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]


def convert(model: Path, out: Path) -> None:
    """Write weights in float32; the type of the computation is chosen at load."""
    from float32 import write_float32
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    missing = AutoConfig.from_pretrained(model).vocab_size - len(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        padded = Path(folder)
        write_float32(model, padded)
        tokenizer.add_tokens([f"<unused-{number}>" for number in range(missing)])  # it wants a word for every row
        tokenizer.unk_token = tokenizer.unk_token or tokenizer.eos_token  # it does not load without one
        tokenizer.save_pretrained(padded)
        ctranslate2.converters.TransformersConverter(str(padded)).convert(str(out), force=True)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        Worker(CTranslate2).serve()
