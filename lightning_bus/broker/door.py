"""Who is listened to. A peer that sends one unreadable message after another is not, for a while.

Each such message costs a decoding and an answer, and a peer that gets a hundred in a row wrong learns nothing from the
next answer. What is remembered is bounded: with more such peers than that, the oldest are forgotten.
"""

from __future__ import annotations

UNREADABLE_MAX = 100  # in a row
IGNORED_S = 10.0
REMEMBERED_MAX = 10_000


class Door:
    """What came from whom that could not be read. `unreadable` counts all of it since the broker started."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._in_a_row: dict[bytes, tuple[int, float]] = {}  # identity → how many, and when the last one came

    def admits(self, identity: bytes, now_s: float) -> bool:
        """Whether to look at what this peer sends."""
        if not self._in_a_row:
            return True
        count, last_s = self._in_a_row.get(identity, (0, 0.0))
        if count < UNREADABLE_MAX:
            return True
        if now_s < last_s + IGNORED_S:
            self.unreadable += 1
            return False
        del self._in_a_row[identity]
        return True

    def could_read(self, identity: bytes) -> None:
        if self._in_a_row:
            self._in_a_row.pop(identity, None)

    def could_not_read(self, identity: bytes, now_s: float) -> None:
        self.unreadable += 1
        count, _ = self._in_a_row.pop(identity, (0, 0.0))
        self._in_a_row[identity] = count + 1, now_s
        if len(self._in_a_row) > REMEMBERED_MAX:
            del self._in_a_row[next(iter(self._in_a_row))]
