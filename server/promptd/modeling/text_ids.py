"""Token ids of text prompts: a document that every request names is tokenized once, not once a request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

MAX_TOKENS = 1 << 18


class TextIds:
    """Keeps the texts used last, at most `max_tokens` tokens of them together. Safe to use from any thread."""

    def __init__(self, encode: Callable[[str], list[int]], max_tokens: int = MAX_TOKENS) -> None:
        self._encode = encode
        self._max_tokens = max_tokens
        self._found: OrderedDict[str, tuple[int, ...]] = OrderedDict()  # least recently used first
        self._num_tokens = 0
        self._lock = threading.Lock()

    def of(self, text: str) -> tuple[int, ...]:
        """Tokenize a text, without special tokens."""
        with self._lock:
            if text in self._found:
                self._found.move_to_end(text)
                return self._found[text]
        ids = tuple(self._encode(text))
        with self._lock:
            if text not in self._found:
                self._found[text] = ids
                self._num_tokens += len(ids)
            while self._num_tokens > self._max_tokens:
                _, dropped = self._found.popitem(last=False)
                self._num_tokens -= len(dropped)
        return ids
