"""Training rows are checked one by one, and every fault names its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training import (
    TaskFormat,
    TrainingDataError,
    data_digest,
    encode_examples,
    example_of,
    label_word_ids,
    parse_examples,
    read_examples,
    split_examples,
)

GOOD = '{"text": "will it rain", "label": "weather"}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be an object"),
        ('{"text": "a"}', "exactly one of 'completion' and 'label'"),
        ('{"text": "a", "label": "b", "completion": "c"}', "exactly one of 'completion' and 'label'"),
        ('{"text": "a", "label": ""}', "'label' must be a non-empty string"),
        ('{"text": "a", "completion": 3}', "'completion' must be a non-empty string, got 3"),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "both 'prompt' and 'text'"),
        (b'{"text": "\xff", "label": "weather"}', "not UTF-8"),
        (GOOD.encode("utf-16-le"), "not JSON"),
        ('{"text": "a", "label": "b", "text": "c"}', "has the key 'text' twice"),
        ('{"text": "a", "label": "b", "score": NaN}', "not JSON (NaN is no number there)"),
        (f'{{"text": "a", "label": "b", "score": {"9" * 5000}}}', "not JSON (a number with too many digits)"),
        ('{"text": 3, "label": "b"}', "'text' must be a string, got 3"),
    ],
)
def test_a_bad_row_names_its_line(line: str | bytes, says: str) -> None:
    """Line 3 of three lines, one of them empty, is line 3."""
    with pytest.raises(TrainingDataError, match="line 3: ") as caught:
        parse_examples([GOOD, "", line])
    assert says in caught.value.message and caught.value.line == 3 and caught.value.status == 400
    assert len(caught.value.message) < 300


def test_no_rows_is_an_error() -> None:
    """An empty file trains nothing and says so."""
    with pytest.raises(TrainingDataError, match="no rows"):
        parse_examples(["", "  "])


def test_prompt_counts_as_text_and_other_fields_stay() -> None:
    """`prompt` is the field `text`; named fields are there for the template; numbers are not."""
    example = example_of(1, {"prompt": "a", "tone": "dry", "score": 3, "completion": "b"})
    assert dict(example.fields) == {"text": "a", "tone": "dry"} and example.completion == "b" and example.label is None


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    """A `.jsonl.gz` holds the same rows as its `.jsonl`."""
    content = (GOOD + "\n").encode() * 2
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert read_examples(tmp_path / "a.jsonl") == read_examples(tmp_path / "a.jsonl.gz")


def test_equal_inputs_fall_on_the_same_side() -> None:
    """A text with several targets is never in training and in validation at once; about the asked share is held out."""
    rows = [example_of(n, {"text": f"text {n % 500}", "completion": f"answer {n}"}) for n in range(1000)]
    train, held_out = split_examples(rows, 0.2)
    assert not {row.fields["text"] for row in train} & {row.fields["text"] for row in held_out}
    assert len(train) + len(held_out) == 1000 and 130 < len(held_out) < 270


def test_few_rows_are_split_too() -> None:
    """However the hash falls, some rows are held out where that many are asked for; equal inputs stay together."""
    for start in range(50):
        rows = [example_of(n, {"text": f"text {start + n // 2}", "completion": f"answer {n}"}) for n in range(8)]
        train, held_out = split_examples(rows, 0.01, least=2)
        assert len(train) == 6 and len(held_out) == 2
        assert held_out[0].fields == held_out[1].fields
        assert split_examples(rows[:1], 0.01, least=2) in (([], rows[:1]), (rows[:1], []))


def test_digest_follows_content_and_order() -> None:
    """The data digest changes with any row, target or order, and not with line numbers."""
    rows = [example_of(n, {"text": str(n), "label": "x"}) for n in range(3)]
    moved = [example_of(n + 7, {"text": str(n), "label": "x"}) for n in range(3)]
    changed = [*rows[:2], example_of(2, {"text": "2", "label": "y"})]
    assert data_digest(rows) == data_digest(moved)
    assert len({data_digest(rows), data_digest(rows[::-1]), data_digest(changed)}) == 3


@pytest.mark.parametrize(
    ("row", "task", "says"),
    [
        ({"text": "a", "label": "snow"}, TaskFormat(None, {"rain": " x"}), "label 'snow' has no label word"),
        ({"topic": "a", "completion": "b"}, TaskFormat("{text}"), "template field 'text' was not given"),
        ({"text": "", "completion": "b"}, TaskFormat(), "no tokens"),
        ({"text": "word " * 300, "completion": "b"}, TaskFormat(), "exceed the model's length of 256"),
    ],
)
def test_rows_that_do_not_fit_the_task_name_their_line(
    llama: FrozenModel, row: dict[str, str], task: TaskFormat, says: str
) -> None:
    """Label, template and length are checked before training starts."""
    with pytest.raises(TrainingDataError, match="line 9: ") as caught:
        encode_examples(llama, task, [example_of(9, row)], 10)
    assert says in caught.value.message


def test_equal_label_words_are_refused(llama: FrozenModel) -> None:
    """Two labels with the same word could never be told apart."""
    with pytest.raises(InvalidRequestError, match="same word"):
        label_word_ids(llama, TaskFormat(None, {"a": " x", "b": " x"}))


def test_completions_end_with_end_of_text_and_label_words_do_not(llama: FrozenModel) -> None:
    """What is learned is exactly the text's tokens, the target's, and a stop for generation."""
    task = TaskFormat("{text}!", {"x": " rain"})
    rows = [example_of(1, {"text": "a", "completion": "b"}), example_of(2, {"text": "a", "label": "x"})]
    completion, label = encode_examples(llama, task, rows, 1)
    assert completion.text_ids == label.text_ids == tuple(llama.encode("a!"))
    assert completion.target_ids == (*llama.encode("b", add_special_tokens=False), llama.tokenizer.eos_token_id)
    assert label.target_ids == tuple(llama.encode(" rain", add_special_tokens=False))
