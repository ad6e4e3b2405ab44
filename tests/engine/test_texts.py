"""Plain texts as prompts: the same as the text's tokens in front of the input, tokenized and computed once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from promptd_store import PromptArtifact, encode

from promptd.engine.request import SamplingParams
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from promptd.modeling.text_ids import TextIds
from tests.engine.harness import library
from tests.tiny_models import FAMILIES, adding_bos

TEXT = "the restaurant near the river is cheap and the lazy dog plays"
INPUTS = ["some music", "is it", "book a table for two people", "a"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def text_prompt(**fields: object) -> PromptArtifact:
    """The text as a prompt."""
    return encode("text", text=TEXT, **fields)  # type: ignore[arg-type]


def bos_model(model: FrozenModel) -> FrozenModel:
    """The model with a tokenizer that puts BOS in front of every text."""
    tokenizer = adding_bos(model.tokenizer)
    return dataclasses.replace(
        model, tokenizer=tokenizer, family=type(model.family)(model.hf, tokenizer, model.family.sizes)
    )


@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain tokenizer", "adds bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_prompt_is_the_text_in_front(tiny_models: dict[str, Path], family: str, adds_bos: bool) -> None:
    """Same tokens and log-probabilities as the concatenated ids without a prompt, in a batch of other prompts, too."""
    model = load_model(tiny_models[family])
    model = bos_model(model) if adds_bos else model
    llm = LLM(model)
    text = model.encode(TEXT, add_special_tokens=False)
    front = [model.bos_token_id] * adds_bos
    ids = [[*front, *text, *model.encode(one, add_special_tokens=False)] for one in INPUTS]
    expected = llm.generate(ids, params=GREEDY)
    others = list(library(tiny_models[family])[2:6])
    mixed = llm.generate(INPUTS + INPUTS, [*([text_prompt()] * len(INPUTS)), *others], GREEDY)
    assert [one.token_ids for one in mixed[: len(INPUTS)]] == [one.token_ids for one in expected]
    words = [" fox", " music", " the city"]
    scored = torch.tensor(llm.score(INPUTS, words, [text_prompt()] * len(INPUTS)))
    whole = torch.tensor(llm.score(ids, words))
    torch.testing.assert_close(scored, whole, rtol=0, atol=1e-4 * whole.abs().max().item())
    bare = llm.generate(INPUTS, params=GREEDY)
    assert [one.token_ids for one in bare] != [one.token_ids for one in expected]  # control
    if adds_bos:  # control: with BOS in front of the input instead, it is another text
        late = [[*text, *front, *model.encode(one, add_special_tokens=False)] for one in INPUTS]
        moved = torch.tensor(llm.score(late, words))
        assert (moved - whole).abs().max() > 1e-2


def test_its_keys_are_computed_once(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests, one resident entry, one tokenization; what follows it in a chain shares it."""
    model = load_model(tiny_models["llama"])
    llm, user = LLM(model), library(tiny_models["llama"])[2]
    count = len(model.encode(TEXT))
    outputs = llm.generate(INPUTS * 2, [text_prompt()] * 8, GREEDY)
    assert {one.num_virtual_tokens for one in outputs} == {count}
    assert llm.engine.prompts.num_resident == 1
    texts: list[str] = []
    encode_text = type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda self, text, **kw: texts.append(text) or encode_text(self, text, **kw)
    )
    llm.generate(INPUTS, [[text_prompt(), user]] * 4, GREEDY)
    assert llm.engine.prompts.num_resident == 2 and llm.engine.prompts.stats.misses == 2
    assert TEXT not in texts and INPUTS[0] in texts


def test_an_explicit_wish_about_special_tokens_counts(tiny_models: dict[str, Path]) -> None:
    """A text that says that its inputs begin with special tokens has them there."""
    model = bos_model(load_model(tiny_models["llama"]))
    llm = LLM(model)
    asked = torch.tensor(llm.score(["is it"], [" a", " b"], [text_prompt(add_special_tokens=True)]))
    ids = [model.bos_token_id, *model.encode(TEXT, add_special_tokens=False), *model.encode("is it")]
    expected = torch.tensor(llm.score([[one for one in ids if one is not None]], [" a", " b"]))
    torch.testing.assert_close(asked, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_tokens_of_texts_are_kept_within_a_budget() -> None:
    """The texts used last stay, the others are tokenized again; one larger than the budget is never kept."""
    encoded: list[str] = []

    def encode_text(text: str) -> list[int]:
        encoded.append(text)
        return [1] * len(text)

    ids = TextIds(encode_text, max_tokens=10)
    assert ids.of("aaaa") == (1,) * 4
    for text in ("aaaa", "bbbb", "aaaa", "cccc"):  # b leaves: a was used after it
        ids.of(text)
    assert encoded == ["aaaa", "bbbb", "cccc"]
    ids.of("aaaa")
    ids.of("bbbb")
    assert encoded == ["aaaa", "bbbb", "cccc", "bbbb"]
    assert len(ids.of("d" * 11)) == len(ids.of("d" * 11)) == 11
    assert encoded[-2:] == ["d" * 11] * 2
