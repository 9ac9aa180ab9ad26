"""The line of rollouts that wait to be leased: who is next, and why nobody waits for ever.

    queue.push("r-1", group="task-7", priority=0, order=1, now_s=now_s)
    rollout_id = queue.pop(now_s, admissible)

What always holds. What was pushed is handed out once, or dropped once because it was no longer wanted. The same calls
give the same answers. Memory is in proportion to what waits; a push or a pop takes O(log n).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

AGEING_S = 60.0  # of waiting weigh as much as one level of priority
FAIR_QUANTUM = 16  # rollouts of a turn: two GRPO groups of 8 stay whole, and nobody waits long for the turn to pass


class ReadyQueue:
    """Rollouts that may be leased now, in the order that four rules give.

    1. **Within a group** the lowest `order` goes first: the order of submission. A rollout that comes back after a
       failed attempt keeps its order, so it goes before the rest of its group. Rollouts without a group ("") are one
       group among the others, so alone they are plain first come, first served.
    2. **Groups of one priority take turns.** A turn is up to FAIR_QUANTUM rollouts and ends early when the group has
       none left. Then the group stands at the end of the line of groups; a new group stands there from the start. So
       groups of up to FAIR_QUANTUM are handed out whole, one after another, and beside a group of 10,000 a new one
       gets its first lease after at most FAIR_QUANTUM others.
    3. **A group that comes back may go ahead**: one of which nothing waited, and which gets a rollout that is older
       than one already handed out (it failed, or was delayed). Turns alternate between such groups, in the order
       they came back, and the line. So the last of a group need not wait behind all that was submitted since, and
       the line goes on at half its pace at least.
    4. **Between priorities**: each priority offers the rollout that is next by the rules above. The offer with the
       highest `priority + waited_s / AGEING_S` goes; of equals the higher priority. Waiting counts from the push.
       So priority 5 goes before priority 0 unless that has waited 300 s longer; then their places are changed for
       good, because both go on ageing at one pace.

    Nothing starves: before an offer goes at most those that wait with a higher aged priority, and what is pushed
    more than AGEING_S a level later is never one of them.
    """

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}  # by priority; none is empty
        self._offers: list[tuple[float, int]] = []  # heap: one (virtual time or an earlier one, -priority) a class
        self._entries = 0
        self._now_s = -math.inf
        self._newest_order = -1  # the highest that was ever handed out

    def __len__(self) -> int:
        """Entries held, those included that will turn out to be stale."""
        return self._entries

    def push(self, rollout_id: str, *, group: str, priority: int, order: int, now_s: float) -> None:
        """Let a rollout wait from now on. Pushed again, it stands in the line twice; `admissible` sorts that out."""
        self._now_s = max(self._now_s, now_s)
        # Everyone ages at one pace, so who is ahead never changes while both wait, and this number is all that
        # ageing needs. Within a class it only grows from push to push: a push never makes an offer more urgent.
        virtual_s = self._now_s - priority * AGEING_S
        line = self._classes.get(priority)
        if line is None:
            line = self._classes[priority] = _Class()
            heapq.heappush(self._offers, (virtual_s, -priority))
        line.push(group, (order, rollout_id, virtual_s), came_back=order <= self._newest_order)
        self._entries += 1

    def pop(self, now_s: float, admissible: Callable[[str], bool]) -> str | None:
        """Return the rollout to lease next, or None when nothing waits.

        Those for which `admissible` is False were cancelled or leased since: they are dropped, and cost their group
        nothing of its turn. A push after this one counts as no earlier than `now_s`.
        """
        self._now_s = max(self._now_s, now_s)
        while self._offers:
            noted_s, minus = self._offers[0]
            line = self._classes[-minus]
            if (virtual_s := line.offered_s()) > noted_s:  # an older rollout was put before the one that was noted
                heapq.heapreplace(self._offers, (virtual_s, minus))
                continue
            entry = line.take(admissible)
            self._entries -= 1
            if line.current:
                heapq.heapreplace(self._offers, (line.offered_s(), minus))
            else:
                heapq.heappop(self._offers)
                del self._classes[-minus]
            if entry is not None:
                self._newest_order = max(self._newest_order, entry[0])
                return entry[1]
        return None


_Entry = tuple[int, str, float]  # order, rollout_id, virtual time of the push


@dataclass(slots=True)
class _Class:
    """The groups of one priority. `current` has the turn; it is empty only when all are, and then the class goes."""

    groups: dict[str, list[_Entry]] = field(default_factory=dict[str, list[_Entry]])  # heaps; none is empty
    ring: deque[str] = field(default_factory=deque[str])  # groups in line
    returned: deque[str] = field(default_factory=deque[str])  # groups that came back and have not had their turn since
    group: str = ""
    current: list[_Entry] = field(default_factory=list[_Entry])
    left: int = FAIR_QUANTUM  # what `current` may still hand out in this turn
    ring_is_due: bool = False  # the last turn was one of a group that came back

    def push(self, group: str, entry: _Entry, *, came_back: bool) -> None:
        waiting = self.groups.get(group)
        if waiting:
            heapq.heappush(waiting, entry)
            return
        self.groups[group] = [entry]
        (self.returned if came_back else self.ring).append(group)
        if not self.current:
            self._next_turn()

    def offered_s(self) -> float:
        return self.current[0][2]

    def take(self, admissible: Callable[[str], bool]) -> _Entry | None:
        """Remove what is offered. Returns None when that was not wanted any more."""
        entry = heapq.heappop(self.current)
        wanted = admissible(entry[1])
        self.left -= wanted
        if not self.current:
            del self.groups[self.group]
            self._next_turn()
        elif not self.left:
            self.ring.append(self.group)
            self._next_turn()
        return entry if wanted else None

    def _next_turn(self) -> None:
        self.left = FAIR_QUANTUM
        # The line's turn is no reason to give one group two in a row while another waits.
        ring_is_due = self.ring_is_due and bool(self.ring) and self.ring[0] != self.group
        back = bool(self.returned) and not ring_is_due
        self.ring_is_due = back
        line = self.returned if back else self.ring
        if line:
            self.group = line.popleft()
            self.current = self.groups[self.group]
