"""`promptd prompts verify`: PEFT and promptd side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from promptd.commands import peft_oracle
from promptd.commands.peft_oracle import InputError, compare, read_inputs
from promptd.json_line import json_line
from tests.clients.test_cli import run

TEXTS = ["the quick brown fox", "book a table for two", "weather", "play some music in the city tomorrow"]


def _inputs(folder: Path) -> Path:
    file = folder / "inputs.jsonl"
    lines = [TEXTS[0], {"prompt": TEXTS[1]}, {"input": TEXTS[2]}, {"text": TEXTS[3], "label": "x"}]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return file


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_answers_are_identical(adapters: Path, tmp_path: Path, tiny_models: dict[str, Path], kind: str) -> None:
    """Prompts that PEFT saved answer token for token as in PEFT, and the status is 0."""
    arguments = [str(adapters / kind), "--inputs", str(_inputs(tmp_path)), "--model", str(tiny_models["llama"])]
    result = run("prompts", "verify", *arguments, "--max-tokens", "8")
    assert result.exit_code == 0, result.output
    assert "4 of 4 answers are token-identical to PEFT, 0 ties, 0 different" in result.output


def test_a_difference_is_found(adapters: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The control: where promptd runs another prompt than PEFT, answers differ, and none of them is a tie."""
    other = tmp_path / "other.safetensors"
    tensor = load_file(adapters / "soft" / "adapter_model.safetensors")["prompt_embeddings"]
    save_file({"prompt_embeddings": tensor.flip(0).contiguous()}, other)
    results = compare(adapters / "soft", TEXTS, str(tiny_models["llama"]), 8, served=other)
    assert sum(result.is_identical for result in results) < len(results)
    assert not any(result.is_tie for result in results)
    worst = next(result for result in results if not result.is_identical)
    assert worst.position is not None and worst.gap is not None and worst.gap > peft_oracle.TIE_RATIO
    assert "DIFFERS" in worst.explain(1)
    assert worst.expected[: worst.position] == worst.found[: worst.position]
    assert torch.isfinite(torch.tensor(worst.gap))


@pytest.mark.parametrize("content", ["", "{", '{"question": "x"}', "7", '""'])
def test_bad_inputs_are_named(tmp_path: Path, content: str) -> None:
    """A line that holds no text is named by its number."""
    file = tmp_path / "inputs.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=r"inputs\.jsonl"):
        read_inputs(file)


@pytest.mark.parametrize("write", [partial(json.dumps, ensure_ascii=False), json_line])
def test_only_a_line_break_ends_an_input(tmp_path: Path, write: Callable[[str], str]) -> None:
    """A line separator in a JSON string is part of the text, also where it is not escaped."""
    texts = ["one\u2028still one", "two\x85still two", "three\u2029\x1e\nstill three"]
    file = tmp_path / "inputs.jsonl"
    file.write_text("\n".join(map(write, texts)), encoding="utf-8")
    assert read_inputs(file) == texts
    lines = file.read_text(encoding="utf-8").splitlines()
    assert (len(lines) == len(texts)) == (write is json_line), "escaped, every reader sees as many lines"
