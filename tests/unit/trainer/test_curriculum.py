"""Which task comes next: what can be learnt from, mostly; the same after a restart; and nothing is given up for ever."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.curriculum import Rates, choose, pool_of, pool_sizes, update

BOUNDS = (0.2, 0.8)


def rates_of(*rates: float) -> Rates:
    return {str(task): [rate, 1.0] for task, rate in enumerate(rates)}


def test_what_is_learnable_is_chosen_but_for_the_share_that_explores() -> None:
    rates = rates_of(0.0, 0.5, 1.0, 0.2)
    chosen = Counter(choose(rates, group, 4, bounds=BOUNDS, explore=0.25) for group in range(4000))
    assert abs((chosen[0] + chosen[2]) / 4000 - 0.25) < 0.03
    assert min(chosen[0], chosen[2]) > 400 and min(chosen[1], chosen[3]) > 1200
    assert pool_sizes(rates, 4, BOUNDS) == {"too_hard": 1, "learnable": 2, "too_easy": 1}


def test_untried_tasks_come_before_those_that_taught_nothing() -> None:
    rates = rates_of(0.0, 1.0)
    assert {choose(rates, group, 4, bounds=BOUNDS, explore=0.1) for group in range(200)} == {2, 3}


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 10**6), st.floats(0, 1))
def test_there_is_always_a_next_task_and_a_checkpoint_does_not_change_it(
    given_rates: list[float | None], group: int, explore: float
) -> None:
    rates: Rates = {str(task): [rate, 1.0] for task, rate in enumerate(given_rates) if rate is not None}
    task = choose(rates, group, len(given_rates), bounds=BOUNDS, explore=explore)
    assert 0 <= task < len(given_rates)
    restored = msgspec.msgpack.decode(msgspec.msgpack.encode(rates), type=Rates)
    assert choose(restored, group, len(given_rates), bounds=BOUNDS, explore=explore) == task


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8), min_size=1, max_size=30))
def test_a_rate_is_of_the_task_alone_and_stays_a_share(groups: list[list[float]]) -> None:
    rates: Rates = {}
    for rewards in groups:
        update(rates, "7", rewards, success=0.5)
    rate, seen = rates["7"]
    assert -1e-9 <= rate <= 1 + 1e-9 and seen == len(groups) and list(rates) == ["7"]


def test_a_policy_that_learnt_a_task_moves_it_and_failed_rollouts_say_nothing() -> None:
    rates: Rates = {}
    update(rates, "0", [], success=0.5)
    assert pool_of(rates, "0", BOUNDS) == "untried"
    for rewards, pool in (([0.0, 0.0], "too_hard"), ([1.0, 1.0], "learnable"), *12 * (([1.0, 1.0], None),)):
        update(rates, "0", rewards, success=0.5)
        assert pool is None or pool_of(rates, "0", BOUNDS) == pool
    assert pool_of(rates, "0", BOUNDS) == "too_easy"
