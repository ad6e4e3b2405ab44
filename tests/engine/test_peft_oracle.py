"""PEFT at batch size 1 as the oracle: files that it wrote, answers that it gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from promptd.engine.request import SamplingParams
from promptd.llm import LLM
from tests.peft_adapters import WARNS, adapter_configs
from tests.tiny_models import FAMILIES

pytestmark = WARNS
TEXTS = [tuple(range(5, 5 + length)) for length in (3, 11, 24, 17)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_pefts(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Four PEFT adapters of every kind, saved by PEFT, loaded by us, mixed in one batch: token for token PEFT's own
    greedy answers, one request at a time."""
    folders, expected = [], []
    for number, (name, config) in enumerate(adapter_configs("CAUSAL_LM").items()):
        base = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.float32)
        torch.manual_seed(number)
        tuned = get_peft_model(base, config).eval()
        with torch.no_grad():
            for parameter in tuned.prompt_encoder.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        ids = torch.tensor([TEXTS[number]])
        answer = tuned.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        expected.append(tuple(answer[0].tolist()[-10:]))
        folders.append(tmp_path / name)
        tuned.save_pretrained(folders[-1])
    llm = LLM(tiny_models[family])
    found = llm.generate(TEXTS, prompts=folders, params=SamplingParams(max_tokens=10, temperature=0, ignore_eos=True))
    assert [completion.token_ids for completion in found] == expected
    assert len(set(expected)) == len(expected)
    shifted = llm.generate(
        TEXTS, [*folders[1:], folders[0]], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    )
    assert [completion.token_ids for completion in shifted] != expected  # control


def test_llm_speaks_text_and_scores(tiny_models: dict[str, Path]) -> None:
    """`LLM` takes text, token ids, chains and the bare model; scores add up to probabilities."""
    llm = LLM(tiny_models["llama"])
    text = "the quick brown fox"
    by_text, by_ids = llm.generate([text, llm.model.encode(text)], params=SamplingParams(max_tokens=4, temperature=0))
    assert by_text == by_ids
    (scores,) = llm.score([text], [" dog", " lazy dog"])
    assert len(scores) == 2 and max(scores) < 0
