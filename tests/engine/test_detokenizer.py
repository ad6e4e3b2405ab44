"""Tokens to text, piece by piece."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from promptd.engine.detokenizer import Detokenizer
from tests.tiny_models import make_tokenizer

TOKENIZER = make_tokenizer()


def decode(ids: object) -> str:
    """Decode all at once."""
    return TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[call-overload]


def stream(text: str, stop: tuple[str, ...] = (), prompt: str = "the fox") -> tuple[list[str], str | None]:
    """Decode token by token; return the pieces and the stop string found."""
    detokenizer = Detokenizer(decode, TOKENIZER.encode(prompt), stop)
    pieces = []
    for token in TOKENIZER.encode(text):
        found = detokenizer.push(token, may_stop=True)
        if found is not None:
            detokenizer.drop_unread()
            return [*pieces, detokenizer.take(is_last=True)], found
        pieces.append(detokenizer.take(is_last=False))
    return [*pieces, detokenizer.take(is_last=True)], None


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    """Any text, emoji and combining marks too, comes out whole, and no piece ends inside a character."""
    pieces, _ = stream(text)
    assert "".join(pieces) == decode(TOKENIZER.encode(text))
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_end_the_text_and_never_leak(text: str, stop: list[str]) -> None:
    """The text ends before the earliest stop string; not one character of it is sent before that is certain."""
    pieces, found = stream(text, tuple(stop))
    sent = "".join(pieces)
    places = {s: text.find(s) for s in stop if s in text}
    assert (found is not None) == bool(places)
    if not places:
        assert sent == text
    else:
        assert text.startswith(sent)
        assert found in places
        assert not any(s in sent for s in stop)


def test_a_stop_string_over_token_borders_is_found() -> None:
    """A stop string that no single token holds still stops the row."""
    pieces, found = stream("play some musik now", ("me mus",))
    assert ("".join(pieces), found) == ("play so", "me mus")


def test_unfinished_bytes_are_shown_at_the_end() -> None:
    """A generation cut inside a character shows the replacement character, as a whole decode does."""
    detokenizer = Detokenizer(decode, [], ())
    ids = TOKENIZER.encode("a🙂")[:-1]
    text = ""
    for token in ids:
        detokenizer.push(token, may_stop=True)
        text += detokenizer.take(is_last=False)
    assert text == "a"
    assert text + detokenizer.take(is_last=True) == decode(ids)


def test_a_stop_string_in_front_of_unfinished_bytes_is_cut() -> None:
    """A row that ends for another reason while a character is incomplete still ends before its stop string."""
    pieces = {1: "abcd\N{REPLACEMENT CHARACTER}"}  # one token: letters and the first byte of a character
    detokenizer = Detokenizer(lambda ids: "".join(pieces[token] for token in ids), [], ("d",))
    assert detokenizer.push(1, may_stop=True) is None
    assert detokenizer.take(is_last=True) == "abc"
