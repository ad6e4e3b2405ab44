"""Beam search through the engine gives transformers' own answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_store import PromptArtifact, encode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from promptd.engine.request import SamplingParams
from promptd.errors import InvalidRequestError
from promptd.evaluation import LLMBackend, beam_search, evaluate, task_of
from promptd.llm import LLM
from promptd.modeling import load_model
from promptd.training import Example

TEXTS = [(5, 6, 7, 8), (9, *range(30, 42)), (100, 3), (17, 90, 33, 4, 51)]
MAX_TOKENS = 9


def theirs(hf: Any, token_ids: Sequence[int], prompt: PromptArtifact | None, num_beams: int) -> tuple[int, ...]:
    """Transformers' own beam search on one row, the soft prompt in front of its embeddings."""
    embeds = hf.get_input_embeddings()(torch.tensor(token_ids))
    if prompt is not None:
        embeds = torch.cat([prompt.learned, embeds])
    mask = torch.ones(1, len(embeds), dtype=torch.int64)
    with torch.no_grad():
        made = hf.generate(
            inputs_embeds=embeds[None], attention_mask=mask, num_beams=num_beams, do_sample=False,
            max_new_tokens=MAX_TOKENS, min_new_tokens=0, early_stopping=False, length_penalty=1.0,
        )[0].tolist()  # fmt: skip
    return tuple(made[1:] if hf.config.is_encoder_decoder else made)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_answers_are_transformers_own(tiny_models: dict[str, Path], tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Rows under soft prompts and bare ones, searched at once, with an ending token that beams do reach."""
    folder = (tiny_models | tiny_seq2seq)[family]
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM
    hf = auto.from_pretrained(folder, attn_implementation="eager").eval()
    llm = LLM(load_model(folder))
    spec, generator = llm.model.spec, torch.Generator().manual_seed(2)
    softs = [encode("soft", torch.randn(n, spec.hidden_size, generator=generator)) for n in (2, 5)]
    prompts = [None, softs[0], softs[1], softs[0]]
    endless = beam_search(llm, TEXTS, prompts, num_beams=2, max_tokens=MAX_TOKENS)
    ends = sorted({*llm.model.eos_token_ids, endless[0][4], endless[1][5]})
    for config in (hf.generation_config, llm.model.hf.generation_config):
        config.eos_token_id = ends
    hf.generation_config.pad_token_id = ends[0]
    for num_beams in (2, 4):
        found = beam_search(llm, TEXTS, prompts, num_beams=num_beams, max_tokens=MAX_TOKENS)
        expected = [theirs(hf, text, prompt, num_beams) for text, prompt in zip(TEXTS, prompts, strict=True)]
        assert found == [row[: len(own)] for row, own in zip(expected, found, strict=True)]
        for row, own in zip(expected, found, strict=True):
            assert set(row[len(own) :]) <= {ends[0]}  # padding behind what ended
            assert len(own) == MAX_TOKENS or own[-1] in ends
        assert any(own[-1] in ends for own in found)
    greedy = llm.generate(TEXTS, prompts, SamplingParams(max_tokens=MAX_TOKENS, temperature=0))
    assert found != [row.token_ids for row in greedy]  # control


def test_an_evaluation_with_beams(tiny_seq2seq: dict[str, Path]) -> None:
    """What is generated is what the search finds, cut at a stop; too many beams are refused."""
    llm = LLM(load_model(tiny_seq2seq["t5"]))
    rows = [Example({"text": "the quick"}, "a", None, 1), Example({"text": "brown fox"}, "b", None, 2)]
    task = replace(task_of(rows), max_tokens=8)

    def run(num_beams: int) -> Any:
        work = evaluate(LLMBackend(llm), task, rows, keep_predictions=True, num_beams=num_beams)
        return asyncio.run(work)[0]

    searched = run(3)
    found = beam_search(llm, ["the quick", "brown fox"], [None, None], num_beams=3, max_tokens=task.max_tokens)
    texts = [llm.model.decode(tokens).partition("\n")[0].strip() for tokens in found]
    assert [row.prediction for row in searched.predictions] == texts
    assert (searched.num_beams, run(1).num_beams) == (3, 1)
    assert [row.prediction for row in run(1).predictions] != texts
    with pytest.raises(InvalidRequestError, match="num_beams must be from 1 to 6, got 11"):
        run(11)
