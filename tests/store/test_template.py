"""Templates insert plain named fields and can do nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from promptd_store import TemplateError, render_template, template_fields


def test_fields_are_inserted() -> None:
    """Named fields are replaced, doubled braces are literal, further fields are ignored."""
    fields = {"text": "It {rains}", "lang": "en", "unused": "x"}
    assert render_template("[{lang}] {{json}} {text}{text}\n", fields) == "[en] {json} It {rains}It {rains}\n"
    assert template_fields("[{lang}] {text}{text}") == ("lang", "text")


def test_none_is_the_identity() -> None:
    """No template means the text itself."""
    assert render_template(None, {"text": "as it is {x}"}) == "as it is {x}"
    assert template_fields(None) == ("text",)


@pytest.mark.parametrize(
    "template",
    [
        "{text.__class__}",
        "{text[0]}",
        "{text!r}",
        "{text:>10}",
        "{}",
        "{0}",
        "{ text }",
        "{",
        "}",
        "{{}",
        "{a{b}}",
        "{é}",
    ],
)
def test_everything_else_is_refused(template: str) -> None:
    """Attributes, indexes, conversions, formats, positions and lone braces are typed errors."""
    with pytest.raises(TemplateError) as caught:
        render_template(template, {"text": "x", "a": "y", "0": "z"})
    assert (caught.value.code, caught.value.status) == ("template_invalid", 400)


def test_missing_field_is_named() -> None:
    """A field that was not given is an error that names it."""
    with pytest.raises(TemplateError) as caught:
        render_template("{question}", {"text": "x"})
    assert (caught.value.code, caught.value.param) == ("template_field_missing", "question")


def test_value_must_be_text() -> None:
    """A value that is not a string is refused, not formatted."""
    with pytest.raises(TemplateError) as caught:
        render_template("{text}", {"text": 3})  # type: ignore[dict-item]
    assert caught.value.param == "text"


@given(st.text(), st.text())
def test_values_are_never_read_again(before: str, value: str) -> None:
    """Whatever a value contains, it appears as it is; so does every escaped literal."""
    escaped = before.replace("{", "{{").replace("}", "}}")
    assert render_template(escaped + "{text}", {"text": value}) == before + value


@given(st.text(alphabet="{}ab_.![0", max_size=30))
def test_only_template_errors(template: str) -> None:
    """Any string renders or raises TemplateError, and never reaches an attribute of the value."""
    with contextlib.suppress(TemplateError):
        assert "class" not in render_template(template, {"a": "x", "b": "y"})
