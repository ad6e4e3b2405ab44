"""Tokens to text as they come, with stop strings. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT_TOKENS = 5


class Detokenizer:
    """Text of one generation. Holds back bytes that are not yet a character and text that may begin a stop string."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._decode = decode
        self._stop = stop
        # A few prompt tokens in front: some tokenizers decode a first token differently (a leading space is lost).
        self._ids = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._begin, self._read = 0, len(self._ids)
        self._text = ""
        self._sent = 0

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Add a token; return the stop string that is now complete, if it may end the text (which ends before it)."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._begin : self._read])
        text = self._decode(self._ids[self._begin :])
        if len(text) <= len(known) or text.endswith("�"):
            return None
        self._begin, self._read = self._read, len(self._ids)
        return self._append(text[len(known) :], may_stop=may_stop)

    def _append(self, new: str, *, may_stop: bool) -> str | None:
        searched = max(0, len(self._text) - max(map(len, self._stop), default=1) + 1)
        self._text += new
        found = [(at, stop) for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        if not found or not may_stop:
            return None
        at, stop = min(found)
        self._text = self._text[:at]
        return stop

    def take(self, *, is_last: bool) -> str:
        """Return the text that has become certain since the last call; all that is left when `is_last`."""
        end = len(self._text)
        if is_last:
            end = self._finish()
        elif self._stop:
            end -= self._held()
        new, self._sent = self._text[self._sent : end], max(self._sent, end)
        return new

    def _finish(self) -> int:
        if self._read < len(self._ids):  # bytes that never became a character
            known = self._decode(self._ids[self._begin : self._read])
            self._append(self._decode(self._ids[self._begin :])[len(known) :], may_stop=True)
            self._read = len(self._ids)
        return len(self._text)

    def drop_unread(self) -> None:
        """Forget undecoded tokens: the row ended at a stop string, what follows is not part of the text."""
        self._read = len(self._ids)

    def _held(self) -> int:
        """Length of the longest tail of the text that begins a stop string."""
        for length in range(min(len(self._text), max(map(len, self._stop)) - 1), 0, -1):
            tail = self._text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
