"""Two scorings compared, against the obvious way over all rollouts at once."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.adapters.differences import SHOWN, Compared, Differences, Scoring

TOTALS = st.none() | st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0])


def compared(group: str, at: int, before: float | None, after: float | None) -> Compared:
    scorings = [Scoring(total, {} if total is None else {"final": total}) for total in (before, after)]
    return Compared(f"{group}-{at}", group, scorings[0], scorings[1])


def differences(groups: list[list[tuple[float | None, float | None]]]) -> Differences:
    found = Differences()
    for number, group in enumerate(groups):
        found.add_group(f"g{number}", [compared(f"g{number}", at, *totals) for at, totals in enumerate(group)])
    return found


@given(st.lists(st.lists(st.tuples(TOTALS, TOTALS), min_size=1, max_size=5), max_size=6))
def test_counts_are_those_of_the_obvious_way(groups: list[list[tuple[float | None, float | None]]]) -> None:
    found = differences(groups)
    flat = [pair for group in groups for pair in group]
    assert (found.rollouts, found.groups) == (len(flat), len(groups))
    assert found.changed == sum(before != after for before, after in flat)
    assert found.gained == sum(before is None and after is not None for before, after in flat)
    assert found.lost == sum(before is not None and after is None for before, after in flat)
    swapped = tied = untied = 0
    for group in groups:
        known = [(before, after) for before, after in group if before is not None and after is not None]
        for (a, c), (b, d) in itertools.combinations(known, 2):
            swapped += (a > b and c < d) or (a < b and c > d)
            tied += a != b and c == d
            untied += a == b and c != d
    assert (found.pairs_swapped, found.pairs_tied, found.pairs_untied) == (swapped, tied, untied)
    for after in (False, True):
        totals = [pair[after] for pair in flat if pair[after] is not None]
        assert found.mean(after=after) == (pytest.approx(sum(totals) / len(totals)) if totals else None)
    assert found.informative_after == sum(len({a for _, a in group if a is not None}) > 1 for group in groups)
    assert found.informative_before == sum(len({b for b, _ in group if b is not None}) > 1 for group in groups)
    sizes = [
        math.inf if before is None or after is None else abs(after - before)
        for before, after in flat
        if before != after
    ]
    assert [one.change for one in found.most_changed] == sorted(sizes, reverse=True)[:SHOWN]


def test_adding_one_to_every_reward_changes_all_of_them_and_no_rank() -> None:
    found = differences([[(0.0, 1.0), (0.5, 1.5), (0.5, 1.5)]])
    assert (found.changed, found.pairs, found.pairs_swapped, found.pairs_tied) == (3, 3, 0, 0)
    assert found.groups_best_changed == 0
    (group,) = found.most_changed_groups
    assert (group.rollouts, group.best_changed) == (3, False)
    assert (group.before, group.after) == (pytest.approx(1 / 3), pytest.approx(4 / 3))


def test_another_best_rollout_is_noticed() -> None:
    found = differences([[(0.0, 1.0), (1.0, 0.0)], [(1.0, 1.0), (1.0, 1.0)], [(1.0, 0.0), (1.0, 5.0)]])
    assert (found.groups_best_changed, found.pairs_swapped, found.pairs_untied) == (1, 1, 1)


def test_sums_in_another_order_are_no_change() -> None:
    found = differences([[(0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1)]])
    assert found.changed == 0
    assert found.most_changed == []


def test_a_comparison_of_nothing_has_no_means() -> None:
    found = Differences()
    assert (found.mean(after=True), found.sources(after=True), found.most_changed) == (None, {}, [])
    assert found.facts()["rollouts"] == 0
