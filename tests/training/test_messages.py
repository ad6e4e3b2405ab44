"""Rows of chat messages: read as requests are, the loss on the assistant's last message alone."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from promptd.modeling import FrozenModel, load_model
from promptd.modeling.chat_template import PLAIN_TEMPLATE, encode_chat
from promptd.training import (
    Encoded,
    TaskFormat,
    TrainingDataError,
    data_digest,
    encode_examples,
    evaluate,
    example_of,
    objective_for,
    parse_examples,
    split_examples,
)
from promptd.training.encoding import check_conversations
from tests.training.test_worker import house

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = CHATML.replace("[assistant]{% endif", "[assistant]<think>\n{% endif")


def turn(role: str, content: Any = "hi") -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}


CHAT = [turn("system", "be short"), turn("user", "sun?"), turn("assistant", "star"), turn("user", "moon?")]
ROW = {"messages": [*CHAT, turn("assistant", "the moon")]}


@pytest.fixture
def chatting(llama: FrozenModel) -> FrozenModel:
    """The tiny Llama with a chat template."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = CHATML
    return dataclasses.replace(llama, tokenizer=tokenizer)


def encoded(model: FrozenModel, row: dict[str, Any]) -> Encoded:
    """A row as tokens."""
    return encode_examples(model, TaskFormat(), [example_of(1, row)], 0)[0]


def test_the_tokenizers_template(chatting: FrozenModel) -> None:
    """Text and answer are what the template writes, up to the token that ends the answer, and nothing behind it."""
    row = encoded(chatting, ROW)
    end = "<|endoftext|>"
    front = f"[system]be short{end}\n[user]sun?{end}\n[assistant]star{end}\n[user]moon?{end}\n[assistant]"
    assert row.text_ids == tuple(chatting.encode(front, add_special_tokens=False)) == tuple(encode_chat(chatting, CHAT))
    assert row.target_ids == tuple(chatting.encode(f"the moon{end}", add_special_tokens=False))
    spaced = encoded(chatting, {"messages": [*CHAT, turn("assistant", "  the moon ")]})
    assert spaced.target_ids == row.target_ids  # as the template trims it


def test_a_template_that_writes_past_answers_otherwise(chatting: FrozenModel) -> None:
    """Where the answer cannot be read off the template, it is the message itself and the end of text."""
    chatting.tokenizer.chat_template = THINKING
    row = encoded(chatting, ROW)
    assert row.text_ids[-8:] == tuple(chatting.encode("[assistant]<think>\n", add_special_tokens=False))[-8:]
    assert row.target_ids == (*chatting.encode("the moon", add_special_tokens=False), chatting.tokenizer.eos_token_id)


def test_the_plain_form(llama: FrozenModel) -> None:
    """Without a template: role, colon, content, an empty line; the answer ends with the end of text."""
    row = encoded(llama, ROW)
    front = "system:\nbe short\n\nuser:\nsun?\n\nassistant:\nstar\n\nuser:\nmoon?\n\nassistant:\n"
    assert row.text_ids == tuple(llama.encode(front))
    assert row.target_ids == (*llama.encode("the moon", add_special_tokens=False), llama.tokenizer.eos_token_id)


def test_the_loss_is_on_the_last_message_alone(tiny_models: dict[str, Path], chatting: FrozenModel) -> None:
    """Equal to transformers' own loss with everything but the last message masked, and other without the mask."""
    row = encoded(chatting, ROW)
    ours = evaluate(chatting, None, [row], objective_for(chatting, TaskFormat())).loss
    hf = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    ids = torch.tensor([[*row.text_ids, *row.target_ids]])
    masked = ids.clone()
    masked[0, : len(row.text_ids)] = -100
    assert ours == pytest.approx(hf(ids, labels=masked).loss.item(), rel=1e-5)
    assert ours != pytest.approx(hf(ids, labels=ids).loss.item(), rel=1e-3)


BAD: list[tuple[Any, str]] = [
    ({"messages": []}, "must be a list of at least one message, got []"),
    ({"messages": "hi"}, "must be a list of at least one message, got 'hi'"),
    ({"messages": ["hi"]}, "message 1 must be an object, got 'hi'"),
    ({"messages": [turn("user"), turn("robot")]}, "message 2: 'role' must be one of system, developer, user"),
    ({"messages": [{"content": "hi"}]}, "message 1: 'role' must be one of"),
    ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
    ({"messages": [turn("user", 3), turn("assistant")]}, "message 1: 'content' must be a string, got 3"),
    ({"messages": [turn("user", [{"type": "text"}]), turn("assistant")]}, "message 1: 'content' must be a string"),
    ({"messages": [turn("user", None), turn("assistant")]}, "message 1: 'content' must be a string, got None"),
    ({"messages": [turn("user") | {"weight": 0}]}, "message 1 has the unknown field 'weight'"),
    ({"messages": CHAT}, "the last message must be a non-empty one of the assistant"),
    ({"messages": [*CHAT, turn("assistant", "")]}, "the last message must be a non-empty one of the assistant"),
    ({"messages": [turn("assistant")]}, "answers to nothing"),
    (ROW | {"completion": "x"}, "a row of messages has no other fields, got ['completion']"),
    (ROW | {"tools": []}, "a row of messages has no other fields, got ['tools']"),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_names_its_line_and_message(row: Any, says: str) -> None:
    """Every fault is told with the line, the message's number and the value."""
    with pytest.raises(TrainingDataError, match="line 3: ") as caught:
        parse_examples([json.dumps(ROW), "", json.dumps(row)])
    assert says in caught.value.message and len(caught.value.message) < 400


def test_what_the_template_refuses_names_its_line(chatting: FrozenModel) -> None:
    """A template's own complaint is a bad row, not a crash."""
    rows = [example_of(4, ROW), example_of(9, {"messages": [turn("tool"), turn("assistant")]})]
    for check in (check_conversations, lambda model, given: encode_examples(model, TaskFormat(), given, 0)):
        with pytest.raises(TrainingDataError, match=r"line 9: the chat template refuses.*no tools here"):
            check(chatting, rows)


def test_splits_and_digests_see_the_conversation() -> None:
    """Equal conversations fall on one side; any changed message is other data."""
    rows = [example_of(n, {"messages": [turn("user", f"q{n % 50}"), turn("assistant", str(n))]}) for n in range(200)]
    train, held_out = split_examples(rows, 0.3)
    assert train and held_out
    assert not {str(row.input) for row in train} & {str(row.input) for row in held_out}
    other = example_of(1, {"messages": [turn("user", "q1!"), turn("assistant", "1")]})
    assert data_digest([rows[1]]) != data_digest([other])


def test_a_job_of_conversations(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Through the queue; without a chat template the prompt says that it reads the plain form."""
    rows = [{"messages": [turn("user", f"say {n % 9}"), turn("assistant", "word")]} for n in range(40)]
    plain = load_model(tiny_models["llama"])
    templated = load_model(tiny_models["llama"])
    templated.tokenizer.chat_template = CHATML

    async def story(model: FrozenModel, folder: Path, template: str | None) -> None:
        async with house(model, folder) as home:
            job = await home.ended(await home.create(rows, name="chat", settings={"num_steps": 40}))
            assert job.result is not None, job.error
            assert job.result.scores_after["loss"] < job.result.scores_before["loss"] / 2
            assert (await home.catalog.resolve("acme", "chat")).manifest["template"] == template

    asyncio.run(story(plain, tmp_path / "plain", PLAIN_TEMPLATE))
    asyncio.run(story(templated, tmp_path / "templated", None))
