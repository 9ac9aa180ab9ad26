"""Things to do at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.broker.deadlines import SLACK, Deadlines


def test_what_is_due_comes_once_and_the_earliest_first() -> None:
    deadlines = Deadlines[str]()
    for key, at_s in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("d", 9.0)):
        deadlines.set(key, at_s)
    assert deadlines.due(0.9) == []
    assert deadlines.due(3.0) == ["a", "b", "c"]
    assert deadlines.due(3.0) == []
    assert list(deadlines) == ["d"]


def test_a_deadline_that_is_moved_is_due_at_its_new_time_only() -> None:
    deadlines = Deadlines[str]()
    deadlines.set("a", 1.0)
    deadlines.set("a", 5.0)
    deadlines.set("b", 5.0)
    deadlines.discard("b")
    assert deadlines.due(2.0) == []
    assert deadlines.at_s("a") == 5.0
    assert deadlines.due(5.0) == ["a"]


def test_deadlines_that_are_moved_for_ever_take_no_room() -> None:
    deadlines = Deadlines[int]()
    for number in range(100_000):
        deadlines.set(number % 10, float(number))
    assert len(deadlines) == 10
    assert len(deadlines._heap) <= 2 * 10 + SLACK + 1  # pyright: ignore[reportPrivateUsage]


steps = st.lists(st.tuples(st.sampled_from(["set", "discard", "due"]), st.integers(0, 5), st.integers(0, 20)))


@given(steps)
def test_it_does_what_a_plain_dict_would(steps: list[tuple[str, int, int]]) -> None:
    deadlines, plain = Deadlines[int](), dict[int, int]()
    for what, key, at_s in steps:
        if what == "set":
            deadlines.set(key, at_s)
            plain[key] = at_s
        elif what == "discard":
            deadlines.discard(key)
            plain.pop(key, None)
        else:
            due = {key: at for key, at in plain.items() if at <= at_s}
            found = deadlines.due(at_s)
            assert set(found) == set(due)
            assert [due[key] for key in found] == sorted(due.values())
            plain = {key: at for key, at in plain.items() if at > at_s}
        assert set(deadlines) == set(plain)
