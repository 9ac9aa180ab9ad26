"""Log records → complete groups of finished rollouts, in the order in which the log completed them. Pure.

    groups = Groups(size=8, cursor=saved)
    for record in log.records(groups.next_offset):
        groups.feed(record)
        while (group := groups.take()) is not None:
            ...
            saved = groups.cursor                     # after a restart the next group is the one after this

What always holds: which groups come, and in which order, depends on the log alone. A reader that was stopped anywhere
and goes on from its cursor is handed exactly the groups that it was not handed before. Nothing is asked of whoever
writes the log, so a slow reader slows nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from lightning_bus.adapters.rollouts import Assembler, FinishedRollout
from lightning_bus.records import Record


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one task, ended, by id: what is learnt does not depend on which of them ended first."""

    name: str
    rollouts: tuple[FinishedRollout, ...]


class Cursor(msgspec.Struct, frozen=True):
    """Where a reader of groups is: plain values, to be kept wherever its other state is.

    offset    where to read on from: nothing before it is wanted any more
    consumed  rollouts that lie beyond it and were handed out already, with the offset of their submission
    """

    offset: int = 0
    consumed: dict[str, int] = {}


class Groups:
    """Feed it every record, in order, and take the groups that became complete. Keeps what is unfinished."""

    def __init__(self, *, size: int, cursor: Cursor | None = None, labels: Mapping[str, str] | None = None) -> None:
        """size    rollouts that make a group complete; one that has no group is complete by itself
        labels  rollouts that do not carry these take no part
        """
        cursor = cursor or Cursor()
        self._size = size
        self._labels = dict(labels or {}).items()
        self._consumed = dict(cursor.consumed)
        self._assembler = Assembler(cursor.offset)
        self._open: dict[str, list[FinishedRollout]] = {}
        self._complete: deque[Group] = deque()

    def feed(self, record: Record) -> FinishedRollout | None:
        """Take one record; return the rollout that it ended, if it ended one, whether it takes part or not."""
        finished = self._assembler.feed(record)
        if finished is not None and self._labels <= finished.labels.items():
            self._add(finished)
        return finished

    def take(self) -> Group | None:
        """Return the next complete group, which is consumed from now on; None when there is none yet."""
        if not self._complete:
            return None
        group = self._complete.popleft()
        self._consumed.update((rollout.rollout_id, rollout.first_offset) for rollout in group.rollouts)
        return group

    def peek(self) -> Group | None:
        """Return the group that `take` would, and leave it here."""
        return self._complete[0] if self._complete else None

    @property
    def complete(self) -> int:
        """How many groups can be taken."""
        return len(self._complete)

    @property
    def unfinished(self) -> int:
        """How many groups wait for rollouts that have not ended: what is carried over."""
        return len(self._open)

    @property
    def next_offset(self) -> int:
        """Of the record to feed next."""
        return self._assembler.next_offset

    @property
    def cursor(self) -> Cursor:
        """Where a successor has to go on, to be handed what was not taken here."""
        held = [rollout for rollouts in self._open.values() for rollout in rollouts]
        held += [rollout for group in self._complete for rollout in group.rollouts]
        low = min([self._assembler.low_offset, *(rollout.first_offset for rollout in held)])
        # What lies before is never read again, so what is kept does not grow with what was consumed.
        self._consumed = {rollout_id: first for rollout_id, first in self._consumed.items() if first >= low}
        return Cursor(low, dict(self._consumed))

    def _add(self, finished: FinishedRollout) -> None:
        if finished.rollout_id in self._consumed:
            return
        name = finished.group or finished.rollout_id
        members = self._open.setdefault(name, [])
        members.append(finished)
        if len(members) == self._size or not finished.group:
            members.sort(key=_by_id)
            self._complete.append(Group(name, tuple(self._open.pop(name))))


def _by_id(rollout: FinishedRollout) -> str:
    return rollout.rollout_id
