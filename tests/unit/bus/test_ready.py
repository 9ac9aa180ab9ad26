"""The line of waiting rollouts, rule by rule, and how long anybody can be made to wait."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bus.broker.ready import AGEING_S, FAIR_QUANTUM, ReadyQueue

LEVEL_S = AGEING_S


class Line:
    """A queue of rollouts named group-order, with a submission order and a clock of its own."""

    def __init__(self) -> None:
        self.queue = ReadyQueue()
        self.order = 0
        self.now_s = 1000.0
        self.unwanted: set[str] = set()

    def submit(self, group: str, count: int = 1, priority: int = 0) -> list[str]:
        return [self.put(group, self.order, priority) for _ in range(count)]

    def put(self, group: str, order: int, priority: int = 0) -> str:
        rollout_id = f"{group}-{order}"
        self.queue.push(rollout_id, group=group, priority=priority, order=order, now_s=self.now_s)
        self.order = max(self.order, order + 1)
        return rollout_id

    def next(self) -> str | None:
        return self.queue.pop(self.now_s, lambda rollout_id: rollout_id not in self.unwanted)

    def take(self, count: int) -> list[str]:
        return [rollout_id for _ in range(count) if (rollout_id := self.next()) is not None]

    def rest(self) -> list[str]:
        return self.take(len(self.queue))


def groups(rollout_ids: Iterable[str]) -> list[str]:
    return [rollout_id.rpartition("-")[0] for rollout_id in rollout_ids]


def test_an_empty_line_has_nobody_next() -> None:
    line = Line()
    assert line.next() is None
    line.submit("a")
    assert line.rest() == ["a-0"]
    assert line.next() is None
    assert len(line.queue) == 0


def test_rollouts_without_a_group_are_first_come_first_served() -> None:
    line = Line()
    submitted = line.submit("", 3 * FAIR_QUANTUM)
    assert line.rest() == submitted


def test_grpo_groups_submitted_together_are_handed_out_whole() -> None:
    line = Line()
    submitted = [rollout_id for number in range(50) for rollout_id in line.submit(f"task{number}", 8)]
    assert line.rest() == submitted


def test_beside_a_group_of_ten_thousand_another_waits_one_turn_at_most() -> None:
    line = Line()
    line.submit("vast", 10_000)
    line.take(5)
    (small,) = line.submit("small")
    taken = line.take(FAIR_QUANTUM + 1)
    assert taken.index(small) == FAIR_QUANTUM - 5


def test_groups_take_turns_of_the_quantum() -> None:
    line = Line()
    for name in "abc":
        line.submit(name, 2 * FAIR_QUANTUM)
    assert groups(line.rest()) == [name for name in "abcabc" for _ in range(FAIR_QUANTUM)]


def test_a_rollout_that_failed_goes_before_the_rest_of_its_group() -> None:
    line = Line()
    line.submit("a", 4)
    first, second = line.take(2)
    line.put("a", 0)
    assert (first, second) == ("a-0", "a-1")
    assert line.rest() == ["a-0", "a-2", "a-3"]


def test_the_last_of_a_group_does_not_wait_behind_all_that_was_submitted_since() -> None:
    line = Line()
    line.submit("a", 8)
    line.take(8)
    for number in range(100):
        line.submit(f"b{number}", 8)
    line.take(3)
    line.put("a", 7)
    taken = line.take(6)
    assert taken.index("a-7") == 5, "it goes as soon as the turn is over"


def test_groups_that_come_back_leave_every_other_turn_to_the_line() -> None:
    """A worker that hands back whatever it is given slows the others down by half and does not stop them."""
    line = Line()
    line.submit("x")
    line.submit("y")
    line.submit("a", 40)
    assert line.take(2) == ["x-0", "y-1"]
    line.submit("b", 40)
    taken: list[str] = []
    while len(taken) < 80:
        line.put("x", 0)
        line.put("y", 1)
        taken += line.take(2)
    # x and y alternate with turns of a and b, which are turns of up to 16.
    assert groups(taken).count("a") >= 20
    assert groups(taken).count("b") >= 16


def test_higher_priority_goes_first() -> None:
    line = Line()
    low, high, middle = line.submit("", priority=-3), line.submit("", priority=7), line.submit("", priority=2)
    assert line.rest() == high + middle + low


def test_waiting_a_minute_weighs_as_much_as_a_level() -> None:
    line = Line()
    (patient,) = line.submit("a", priority=0)
    line.now_s += 5 * LEVEL_S - 1
    (early,) = line.submit("b", priority=5)
    line.now_s += 2
    (late,) = line.submit("c", priority=5)
    assert line.rest() == [early, patient, late]


def test_of_equals_the_higher_priority_goes_first() -> None:
    line = Line()
    (patient,) = line.submit("a", priority=0)
    line.now_s += LEVEL_S
    (urgent,) = line.submit("b", priority=1)
    assert line.rest() == [urgent, patient]


def test_an_endless_stream_of_higher_priority_starves_nobody() -> None:
    """One is leased a second, two urgent ones arrive a second: the patient one goes when it is level with them."""
    line = Line()
    (patient,) = line.submit("patient", priority=0)
    leased: list[str | None] = []
    for second in range(int(8 * LEVEL_S)):
        line.submit(f"urgent{second}", 2, priority=3)
        leased.append(line.next())
        line.now_s += 1.0
    # Those that were submitted within three levels of it go first: two a second for 180 s, and one is leased a second.
    assert abs(leased.index(patient) - 2 * 3 * LEVEL_S) <= 2


def test_an_endless_stream_of_new_groups_does_not_stop_a_vast_one() -> None:
    line = Line()
    line.submit("vast", 1000)
    taken: list[str] = []
    for number in range(2000):
        line.submit(f"new{number}")
        taken += line.take(2)
    assert groups(taken).count("vast") == 1000


def test_what_is_not_wanted_any_more_is_dropped_and_costs_its_group_nothing() -> None:
    line = Line()
    a = line.submit("a", 2 * FAIR_QUANTUM)
    (b,) = line.submit("b")
    line.unwanted = set(a[:FAIR_QUANTUM])
    assert line.take(FAIR_QUANTUM) == a[FAIR_QUANTUM:]
    assert line.take(1) == [b]
    assert len(line.queue) == 0


def test_a_priority_whose_urgent_rollout_was_cancelled_does_not_go_first_for_it() -> None:
    line = Line()
    (old,) = line.submit("a", priority=0)
    line.now_s += 2 * LEVEL_S
    (young,) = line.submit("b", priority=0)
    (urgent,) = line.submit("c", priority=1)
    line.unwanted = {old}
    assert line.rest() == [urgent, young]


def test_pushed_twice_and_leased_once() -> None:
    """A rollout whose entry became stale and that was queued again is in the line twice."""
    line = Line()
    line.put("a", 0)
    line.put("a", 0)
    assert line.next() == "a-0"
    line.unwanted = {"a-0"}
    assert line.next() is None
    assert len(line.queue) == 0


def test_a_clock_that_goes_back_is_not_believed() -> None:
    line = Line()
    line.submit("a", priority=1)
    line.now_s -= 10 * LEVEL_S
    (late,) = line.submit("b", priority=0)
    assert line.rest()[-1] == late
