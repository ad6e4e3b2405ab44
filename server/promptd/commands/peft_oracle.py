"""PEFT at batch size 1, the oracle of `promptd prompts verify`, beside promptd's own engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from promptd.engine.request import SamplingParams
from promptd.llm import LLM

TIE_RATIO = 1e-4
"""Two logits closer than this share of the largest may change places by rounding."""


class InputError(Exception):
    """The file of inputs, or the folder, cannot be used."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One input's two answers. `position` is where they first differ; `gap` is PEFT's there, best less second best."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    position: int | None = None
    gap: float | None = None
    is_tie: bool = False

    @property
    def is_identical(self) -> bool:
        """True where every token is the same."""
        return self.position is None

    def explain(self, number: int) -> str:
        """Describe a difference in one line."""
        kind = "tie" if self.is_tie else "DIFFERS"
        gap = "" if self.gap is None else f" (PEFT's two best logits are {self.gap:.2g} apart)"
        return f"{kind}  input {number}, token {self.position}{gap}: {self.text[:60]!r}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"is_identical": self.is_identical}


def read_inputs(file: Path) -> list[str]:
    """Read one text a line: a JSON string, or an object with one of the usual fields."""
    texts = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number}: not JSON ({error})") from error
        if isinstance(value, dict):
            value = next((value[name] for name in ("prompt", "input", "text") if name in value), None)
        if not isinstance(value, str) or not value:
            raise InputError(f'{file}, line {number}: expected a text, or an object with "prompt", "input" or "text"')
        texts.append(value)
    if not texts:
        raise InputError(f"{file}: no inputs in it")
    return texts


def compare(
    folder: Path, texts: Sequence[str], model: str, max_tokens: int, served: Path | None = None
) -> list[Comparison]:
    """Answer every text with both, greedily and in float32 on the CPU: PEFT with `folder`, promptd with `served`."""
    llm = LLM(model, device="cpu", dtype="float32")
    prompt = llm.load_prompt(served or folder)
    inputs = [tuple(llm.model.encode(text)) for text in texts]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    found = llm.generate(inputs, [prompt] * len(inputs), params)
    eos = llm.model.eos_token_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of positions that it makes itself, and of its own future
        base = AutoModelForCausalLM.from_pretrained(str(llm.model.hf.name_or_path), dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, str(folder)).eval()
        expected = [_answer(tuned, token_ids, max_tokens, eos) for token_ids in inputs]
    return [
        _compare(text, one, _without(answer.token_ids, eos))
        for text, one, answer in zip(texts, expected, found, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Answer:
    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]
    """At each step, the best logit less the second best, as a share of the largest."""


@torch.no_grad()
def _answer(model: Any, token_ids: Sequence[int], max_tokens: int, eos: frozenset[int]) -> _Answer:
    ids = torch.tensor([token_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(eos) or None,
        pad_token_id=min(eos, default=0),
        return_dict_in_generate=True,
        output_logits=True,
    )
    num_new = len(output.logits)
    gaps = []
    for logits in output.logits:
        best = torch.topk(logits[0].float(), 2).values
        gaps.append(((best[0] - best[1]) / logits.abs().max()).item())
    return _Answer(_without(output.sequences[0].tolist()[-num_new:], eos), tuple(gaps))


def _without(token_ids: Sequence[int], eos: frozenset[int]) -> tuple[int, ...]:
    """Drop a final end-of-text token: whether it is reported is a matter of taste."""
    return tuple(token_ids[:-1] if token_ids and token_ids[-1] in eos else token_ids)


def _compare(text: str, expected: _Answer, found: tuple[int, ...]) -> Comparison:
    if expected.token_ids == found:
        return Comparison(text, expected.token_ids, found)
    pairs = enumerate(zip(expected.token_ids, found, strict=False))
    position = next((at for at, (one, other) in pairs if one != other), min(len(expected.token_ids), len(found)))
    gap = expected.gaps[position] if position < len(expected.gaps) else None
    return Comparison(text, expected.token_ids, found, position, gap, gap is not None and gap < TIE_RATIO)
