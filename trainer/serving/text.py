"""Token ids to text, piece by piece.

Always holds: the pieces joined are what decoding all ids at once gives, and no piece ends inside a character. A
tokenizer object is not safe to use from two threads, so each thread is given its own.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder writes for the bytes of an unfinished character


class Detokenizer:
    """Turns a growing list of ids into text; `push` returns what the new ids added, which may be nothing yet."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        # Ids before `_context` are settled; those up to `_shown` are decoded along because a token's text may
        # depend on its left neighbour (a leading space, half a character).
        self._context = 0
        self._shown = 0

    def push(self, token_ids: list[int], *, last: bool = False) -> str:
        """The text these ids add. `last` gives out an unfinished character too."""
        self._ids += token_ids
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        if now.endswith(INCOMPLETE) and not last:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Watches growing text for the first of some strings."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self.text = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take in more text; return what may be shown, which is never part of a stop string that completes later."""
        shown = self._safe()
        self.text += piece
        hits = [(at, stop) for stop in self._stops if (at := self.text.find(stop, max(0, shown - self._longest))) >= 0]
        if hits:
            at, self.found = min(hits)
            self.text = self.text[:at]
            return self.text[shown:]
        return self.text[shown : self._safe()]

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        return "" if self.found else self.text[self._safe() :]

    def _safe(self) -> int:
        return max(0, len(self.text) - max(self._longest - 1, 0))
