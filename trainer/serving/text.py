"""Token ids to text, piece by piece.

Always holds: the pieces joined are what decoding all ids at once gives, and no piece ends inside a character. A
tokenizer object is not safe to use from two threads, so each thread is given its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder writes for the bytes of an unfinished character


class TextState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where the text of one choice stands between two pieces; the fields are those of the classes it is kept for."""

    window: list[int] = []
    shown: Annotated[int, msgspec.Meta(ge=0)] = 0
    held: str = ""
    found: str | None = None
    pending: str = ""
    calls_sent: Annotated[int, msgspec.Meta(ge=0)] = 0


class Detokenizer:
    """Turns a growing list of ids into text; `push` returns what the new ids added, which may be nothing yet.

    window, shown  where an earlier one left off, as its attributes of the same names say
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_special_tokens: bool = True,
        window: Sequence[int] = (),
        shown: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Ids whose text is out are kept for one more push, because a token's text may depend on its left neighbour
        # (a leading space, half a character); what is older is settled.
        self.window = list(window)
        self.shown = shown

    def push(self, token_ids: list[int], *, last: bool = False) -> str:
        """The text these ids add. `last` gives out an unfinished character too."""
        if not token_ids and not last:
            return ""
        self.window += token_ids
        before = self._decode(self.window[: self.shown])
        now = self._decode(self.window)
        if now.endswith(INCOMPLETE) and not last:
            return ""
        self.window = self.window[self.shown :]
        self.shown = len(self.window)
        return now[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Watches growing text for the first of some strings.

    held   the end of the text, which may yet turn out to begin a stop string
    found  the stop string that ended the text, from then on
    """

    def __init__(self, stops: tuple[str, ...], *, held: str = "", found: str | None = None) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=1)
        self.held = held
        self.found = found

    def push(self, piece: str) -> str:
        """Take in more text; return what may be shown, which is never part of a stop string that completes later."""
        if self.found is not None:
            return ""
        text = self.held + piece
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits)
            self.held = ""
            return text[:at]
        safe = max(0, len(text) - self._longest + 1)
        self.held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        held, self.held = self.held, ""
        return held
