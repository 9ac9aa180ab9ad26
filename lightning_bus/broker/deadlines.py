"""Things to do at a time, each under a key that can be given up or moved. Time is an argument.

    deadlines.set(key, at_s)       later: deadlines.due(now_s) -> [key, ...], the earliest first

A heap whose entries are not removed but outdated; when most are, it is made anew. So every call is O(log n), and
memory is in proportion to the keys that are set.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

SLACK = 64  # outdated entries that are never worth a new heap


class Deadlines(Generic[K]):
    """Keys by when they are due. Of equal times the one that was set first comes first."""

    def __init__(self) -> None:
        self._at: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._set = 0

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[K]:
        return iter(self._at)

    def __contains__(self, key: K) -> bool:
        return key in self._at

    def at_s(self, key: K) -> float | None:
        """Return when the key is due, None when it is not set."""
        entry = self._at.get(key)
        return None if entry is None else entry[0]

    def set(self, key: K, at_s: float) -> None:
        """Let the key be due then, and not when it was before."""
        self._set += 1
        self._at[key] = at_s, self._set
        heapq.heappush(self._heap, (at_s, self._set, key))
        self._trim()

    def discard(self, key: K) -> None:
        """Forget the key, if it is set."""
        if self._at.pop(key, None) is not None:
            self._trim()

    def due(self, now_s: float) -> list[K]:
        """Remove and return the keys whose time has come."""
        found: list[K] = []
        while self._heap and self._heap[0][0] <= now_s:
            at_s, number, key = heapq.heappop(self._heap)
            if self._at.get(key) == (at_s, number):
                del self._at[key]
                found.append(key)
        return found

    def clear(self) -> None:
        self._at.clear()
        self._heap.clear()

    def _trim(self) -> None:
        if len(self._heap) > 2 * len(self._at) + SLACK:
            self._heap = [(at_s, number, key) for key, (at_s, number) in self._at.items()]
            heapq.heapify(self._heap)
