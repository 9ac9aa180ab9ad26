"""The line of waiting rollouts against a slow twin, and what must hold of it whatever is pushed.

Watched: the twin, which keeps plain lists and looks at all of them each time, answers the same; everything wanted is
handed out once; within a group the oldest goes first; no group sends more than a turn while another of its priority
waits; nothing is kept of what is gone. Not watched: speed.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_bus.broker.ready import AGEING_S, FAIR_QUANTUM, ReadyQueue

GROUPS = ["", "a", "b", "c", "d"]
PRIORITIES = [-1, 0, 2]


class Push(NamedTuple):
    """Submit `count` rollouts."""

    group: str
    priority: int
    count: int


class Back(NamedTuple):
    """Put a rollout that was handed out into the line again."""

    which: int


class Pop(NamedTuple):
    count: int


class Drop(NamedTuple):
    """A rollout that was submitted is not wanted any more."""

    which: int


class Pass(NamedTuple):
    seconds: float


counts = st.one_of(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))
pushes = st.builds(Push, st.sampled_from(GROUPS), st.sampled_from(PRIORITIES), counts)
backs = st.builds(Back, st.integers(0, 1000))
moves = st.one_of(
    pushes,
    pushes,
    st.builds(Pop, counts),
    backs,
    backs,
    st.builds(Drop, st.integers(0, 1000)),
    st.builds(Pass, st.sampled_from([0.5, AGEING_S, 2.5 * AGEING_S])),
)


class Waiting(NamedTuple):
    rollout_id: str
    group: str
    priority: int
    order: int
    pushed_s: float


class Twin:
    """The rules of ReadyQueue as its docstring states them, one list comprehension each."""

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self.lines: dict[int, list[str]] = {priority: [] for priority in PRIORITIES}
        self.returned: dict[int, list[str]] = {priority: [] for priority in PRIORITIES}
        self.turn: dict[int, str | None] = dict.fromkeys(PRIORITIES)
        self.sent = Counter[int]()
        self.was_back = dict.fromkeys(PRIORITIES, False)
        self.newest = -1

    def push(self, entry: Waiting) -> None:
        known = any((w.group, w.priority) == (entry.group, entry.priority) for w in self.waiting)
        self.waiting.append(entry)
        if not known:
            (self.returned if entry.order <= self.newest else self.lines)[entry.priority].append(entry.group)
            if self.turn[entry.priority] is None:
                self.next_turn(entry.priority)

    def of(self, priority: int, group: str | None) -> list[Waiting]:
        entries = [w for w in self.waiting if (w.priority, w.group) == (priority, group)]
        return sorted(entries, key=lambda w: (w.order, w.rollout_id, w.pushed_s))

    def next_turn(self, priority: int) -> None:
        line, returned = self.lines[priority], self.returned[priority]
        back = returned and not (line and line[0] != self.turn[priority] and self.was_back[priority])
        self.turn[priority] = returned.pop(0) if back else line.pop(0) if line else None
        # Whose class is empty is forgotten, its alternation too.
        self.was_back[priority] = bool(back)
        self.sent[priority] = 0

    def pop(self, now_s: float, unwanted: set[str]) -> Waiting | None:
        while self.waiting:
            offers = [self.of(p, group)[0] for p, group in self.turn.items() if group is not None]
            entry = max(offers, key=lambda w: (w.priority * AGEING_S - w.pushed_s, w.priority))
            self.waiting.remove(entry)
            wanted = entry.rollout_id not in unwanted
            self.sent[entry.priority] += wanted
            if not self.of(entry.priority, entry.group):
                self.next_turn(entry.priority)
            elif self.sent[entry.priority] == FAIR_QUANTUM:
                self.lines[entry.priority].append(entry.group)
                self.next_turn(entry.priority)
            if wanted:
                self.newest = max(self.newest, entry.order)
                return entry
        return None


class History:
    """Plays moves on the queue and the twin together, and keeps what the checks need."""

    def __init__(self) -> None:
        self.queue = ReadyQueue()
        self.twin = Twin()
        self.now_s = 0.0
        self.submitted: list[Waiting] = []
        self.out: list[Waiting] = []
        self.unwanted: set[str] = set()
        self.pushed = Counter[str]()
        self.run: dict[int, tuple[str, int]] = {}  # of each priority: the last group, and how many of it in a row

    def play(self, move: Push | Back | Pop | Drop | Pass) -> None:
        match move:
            case Push(group, priority, count):
                for _ in range(count):
                    order = len(self.submitted)
                    self.submitted.append(Waiting(f"r-{order}", group, priority, order, 0.0))
                    self.push(self.submitted[-1])
            case Back(which):
                if self.out:
                    self.push(self.out.pop(which % len(self.out)))
            case Drop(which):
                if self.submitted:
                    self.unwanted.add(self.submitted[which % len(self.submitted)].rollout_id)
            case Pass(seconds):
                self.now_s += seconds
            case Pop(count):
                for _ in range(count):
                    self.pop()

    def push(self, entry: Waiting) -> None:
        entry = entry._replace(pushed_s=self.now_s)
        self.twin.push(entry)
        self.queue.push(
            entry.rollout_id, group=entry.group, priority=entry.priority, order=entry.order, now_s=self.now_s
        )
        self.pushed[entry.rollout_id] += 1

    def pop(self) -> Waiting | None:
        before = [w for w in self.twin.waiting if w.rollout_id not in self.unwanted]
        expected = self.twin.pop(self.now_s, self.unwanted)
        got = self.queue.pop(self.now_s, lambda rollout_id: rollout_id not in self.unwanted)
        assert got == (expected.rollout_id if expected else None)
        assert len(self.queue) == len(self.twin.waiting)
        if expected is not None:
            self.out.append(expected)
            self.check(expected, before)
        return expected

    def check(self, got: Waiting, before: list[Waiting]) -> None:
        rivals = [w for w in before if w.priority == got.priority]
        assert got.order == min(w.order for w in rivals if w.group == got.group)
        group, count = self.run.get(got.priority, ("", 0))
        alone = all(w.group == got.group for w in rivals)
        count = 0 if alone else count + 1 if group == got.group else 1
        self.run[got.priority] = got.group, count
        assert count <= FAIR_QUANTUM


@example([Push("", -1, 2), Pop(2), Push("a", -1, 1), Pop(1), Back(0), Back(0), Back(0), Push("", -1, 17)])
@given(st.lists(moves, min_size=10, max_size=60))
@settings(max_examples=300)
def test_the_line_answers_as_its_slow_twin(played: list[Push | Back | Pop | Drop | Pass]) -> None:
    history = History()
    for move in played:
        history.play(move)
    while history.pop() is not None:
        pass
    assert len(history.queue) == 0
    out = Counter(w.rollout_id for w in history.out)
    wanted = {w.rollout_id for w in history.submitted} - history.unwanted
    assert {rollout_id for rollout_id in wanted if out[rollout_id] != 1} == set()


@given(st.lists(moves, max_size=15), st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=60)
def test_whatever_arrives_afterwards_everything_in_the_line_is_leased(
    played: list[Push | Back | Pop | Drop | Pass], burst: int, one_group: bool
) -> None:
    """Urgent rollouts arrive without end, faster than any are leased; who waits has its turn all the same."""
    history = History()
    for move in played:
        history.play(move)
    queue, levels = history.queue, 4
    present = {w.rollout_id for w in history.twin.waiting} - history.unwanted
    groups = len({(w.group, w.priority) for w in history.twin.waiting})
    # A lead of so many levels, in pops of one second; then turns between those present and those that came meanwhile.
    lead = int((levels - min(PRIORITIES)) * AGEING_S)
    limit = burst * lead + (len(present) + groups + burst) * (2 * FAIR_QUANTUM + 2) * 2
    for number in range(limit):
        if not present:
            break
        history.now_s += 1.0
        for i in range(burst):
            order = 1_000_000 + number * burst + i
            group = "stream" if one_group else f"stream{order}"
            queue.push(f"s-{order}", group=group, priority=levels, order=order, now_s=history.now_s)
        present.discard(
            queue.pop(history.now_s, lambda rollout_id: rollout_id not in history.unwanted) or "the line is never empty"
        )
    assert not present
