"""Credit: each rule against its formula, and that shares sum to what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.adapters import Episode, call_advantages, rollout_advantages
from lightning_bus.adapters.credit import identical, leave_one_out, td_lambda, to_go, turn
from tests.reference import credit as reference

numbers = st.floats(-4, 4, width=16)
own_rewards = st.lists(numbers, max_size=6)
some_rewards = st.lists(numbers, min_size=1, max_size=6)
factors = st.floats(0, 1, width=16)
# Few states, so that rollouts meet: (group, [(state, own reward)], final reward).
batches = st.lists(
    st.tuples(st.sampled_from("gh"), st.lists(st.tuples(st.sampled_from("abcd"), numbers), max_size=4), numbers),
    min_size=1,
    max_size=7,
)


def rollouts_of(batch: Any) -> list[reference.Rollout]:
    return [(group, [s for s, _ in turns], [r for _, r in turns], final) for group, turns, final in batch]


def episodes_of(batch: Any) -> list[Episode]:
    return [Episode(g, final, np.array(own, np.float64), states) for g, states, own, final in rollouts_of(batch)]


def episode(group: str, final: float, *own: float, states: str = "") -> Episode:
    return Episode(group, final, np.array(own, np.float64), list(states or "abcdefgh"[: len(own)]))


# -- returns of one rollout


@given(own_rewards, numbers)
def test_identical_gives_every_turn_the_whole_return(own: list[float], final: float) -> None:
    returns = identical(own, final)
    assert returns.tolist() == pytest.approx([final + sum(own)] * len(own))


@given(some_rewards, numbers, factors, factors)
def test_shares_of_turns_sum_to_own_rewards_and_the_final_one_with_its_echoes(
    own: list[float], final: float, relevance: float, gamma: float
) -> None:
    returns = turn(own, final, relevance=relevance, gamma=gamma)
    echoes = sum(gamma**k for k in range(1, len(own)))
    assert returns.sum() == pytest.approx(sum(own) + final * (1 + relevance * echoes), abs=1e-9)
    assert returns[-1] == pytest.approx(own[-1] + final)


@given(some_rewards, numbers)
def test_without_relevance_the_final_reward_is_the_last_turns_and_with_all_of_it_everybodys(
    own: list[float], final: float
) -> None:
    assert turn(own, final, relevance=0).sum() == pytest.approx(sum(own) + final)
    assert turn(own, final, relevance=1).tolist() == pytest.approx([earned + final for earned in own])


@given(some_rewards, numbers, factors)
def test_the_return_from_the_first_turn_is_the_rollouts_discounted_return(
    own: list[float], final: float, gamma: float
) -> None:
    returns = to_go(own, final, gamma=gamma)
    assert returns[0] == pytest.approx(reference.return_from(own, final, 0, gamma), abs=1e-9)
    assert to_go(own, final)[0] == pytest.approx(sum(own) + final)


@given(some_rewards, numbers, st.lists(numbers, min_size=6, max_size=6), factors, numbers)
def test_td_errors_telescope_to_the_return(
    own: list[float], final: float, values: list[float], gamma: float, bootstrap: float
) -> None:
    """λ = 1: value + advantage of the first turn is all that was earned, and γ^T of what is still expected."""
    found = td_lambda(own, final, values[: len(own)], gamma=gamma, lambda_=1.0, bootstrap=bootstrap)
    expected = reference.return_from(own, final, 0, gamma) + gamma ** len(own) * bootstrap
    assert found.targets_T[0] == pytest.approx(expected, abs=1e-9)


def test_a_critic_that_is_right_leaves_nothing_to_learn() -> None:
    found = td_lambda([0.5, 0.0], 1.0, [1.5, 1.0], gamma=1.0, lambda_=0.7)
    assert found.advantages_T.tolist() == pytest.approx([0, 0])


def test_what_was_cut_off_is_not_taken_for_an_end() -> None:
    cut, ended = (td_lambda([0.0], 0.0, [1.0], gamma=1.0, lambda_=1.0, bootstrap=b) for b in (1.0, 0.0))
    assert (cut.advantages_T.tolist(), ended.advantages_T.tolist()) == ([0.0], [-1.0])


def test_factors_outside_their_range_are_refused() -> None:
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            turn([0.0], 1.0, relevance=bad)
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            td_lambda([0.0], 1.0, [0.0], gamma=bad, lambda_=1.0)


# -- advantages over groups


@given(batches, st.sampled_from(["grpo", "rloo", "reinforce++", "reinforce++_baseline"]))
def test_identical_is_the_group_advantage_of_the_return_on_every_turn(batch: Any, estimator: Any) -> None:
    episodes = episodes_of(batch)
    expected = rollout_advantages([one.total for one in episodes], [one.group for one in episodes], estimator=estimator)
    for found_T, one, advantage in zip(call_advantages(episodes, estimator=estimator), episodes, expected, strict=True):
        assert found_T.dtype == np.float32
        assert found_T.tolist() == [advantage] * len(one.rewards_T)


@given(batches, factors, factors)
def test_turn_advantages_are_those_of_the_slow_twin(batch: Any, relevance: float, gamma: float) -> None:
    found = call_advantages(episodes_of(batch), rule="turn", relevance=relevance, gamma=gamma)
    expected = reference.turn_advantages(rollouts_of(batch), relevance, gamma)
    for found_T, expected_T in zip(found, expected, strict=True):
        np.testing.assert_allclose(found_T, expected_T, atol=1e-5)


@given(batches, factors)
def test_leave_one_out_is_that_of_the_slow_twin(batch: Any, gamma: float) -> None:
    found = call_advantages(episodes_of(batch), rule="leave_one_out", gamma=gamma)
    expected = reference.leave_one_out(rollouts_of(batch), gamma)
    for found_T, expected_T in zip(found, expected, strict=True):
        np.testing.assert_allclose(found_T, expected_T, atol=1e-5)


@given(st.lists(st.tuples(st.integers(1, 9), numbers), min_size=2, max_size=8), factors)
def test_a_rollout_counts_once_however_many_turns_it_has(pairs: Any, relevance: float) -> None:
    """With rewards at the end alone, the last turns of a group sum to 0, whatever the rollouts' lengths."""
    episodes = [episode("g", final, *[0.0] * turns) for turns, final in pairs]
    for rule, of in (("turn", -1), ("identical", 0)):
        found = call_advantages(episodes, rule=rule, relevance=relevance)  # pyright: ignore[reportArgumentType]
        assert sum(float(each[of]) for each in found) == pytest.approx(0, abs=1e-4)


def test_an_average_outcome_is_nobodys_merit() -> None:
    episodes = [episode("g", 0.5, 0.0, 0.0, 0.0), episode("g", 1.0, 0.0), episode("g", 0.0, 0.0)]
    found = call_advantages(episodes, rule="turn", relevance=0.5)
    assert [each.tolist() for each in found] == [[0, 0, 0], [0.5], [-0.5]]


def test_the_turn_that_earned_is_told_from_the_one_that_did_not() -> None:
    episodes = [episode("g", 1.0, 0.3, 0.0), episode("g", 1.0, 0.0, 0.0)]
    found = call_advantages(episodes, rule="turn", relevance=0.5)
    np.testing.assert_allclose(found[0], [0.225, -0.075], atol=1e-6)
    np.testing.assert_allclose(found[1], [-0.075, -0.075], atol=1e-6)


@given(batches, st.sampled_from(["identical", "turn", "leave_one_out"]))
def test_a_rollout_without_a_group_teaches_nothing(batch: Any, rule: Any) -> None:
    alone = [Episode(f"alone {n}", one.final, one.rewards_T, one.states_T) for n, one in enumerate(episodes_of(batch))]
    assert all(not each.any() for each in call_advantages(alone, rule=rule))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6))
def test_where_all_pass_a_state_advantages_there_sum_to_zero(pairs: Any) -> None:
    episodes = [Episode("g", final, np.array([own, 0.0]), ["root", "shared"]) for own, final in pairs]
    found = np.array(leave_one_out(episodes))
    assert abs(found.sum(0)).max() < 1e-9


@given(st.lists(st.tuples(numbers, st.integers(1, 4)), min_size=2, max_size=6))
def test_sharing_nothing_but_the_task_leave_one_out_is_rloo(pairs: Any) -> None:
    episodes = [
        Episode("g", final, np.zeros(turns), ["task", *[f"{n}.{t}" for t in range(1, turns)]])
        for n, (final, turns) in enumerate(pairs)
    ]
    expected = rollout_advantages([one.final for one in episodes], ["g"] * len(episodes), estimator="rloo")
    for found_T, advantage in zip(leave_one_out(episodes), expected, strict=True):
        np.testing.assert_allclose(found_T, np.full(len(found_T), advantage), atol=1e-5)


def test_at_a_shared_state_only_what_follows_is_compared() -> None:
    """Three rollouts, the first two part after the same first turn; the third went another way at once."""
    episodes = [
        episode("g", 1.0, 0.0, 0.0, states="ab"),
        episode("g", 0.0, 0.0, 0.0, states="ab"),
        episode("g", 0.0, 0.0, 0.0, states="ac"),
    ]
    found = call_advantages(episodes, rule="leave_one_out")
    assert [each.tolist() for each in found] == [[1.0, 1.0], [-0.5, -1.0], [-0.5, -0.5]]


def test_values_come_from_a_critic_and_without_one_it_is_said() -> None:
    episodes = [episode("g", 1.0, 0.0, 0.0), episode("g", 0.0, 0.0)]
    found = call_advantages(episodes, rule="value", values=[[0.5, 0.75], [0.5]], lambda_=0.0)
    assert [each.tolist() for each in found] == [[0.25, 0.25], [-0.5]]
    cut = call_advantages(episodes, rule="value", values=[[0.5, 0.75], [0.5]], bootstraps=[0.0, 0.5], lambda_=0.0)
    assert cut[1].tolist() == [0.0]
    with pytest.raises(ValueError, match="needs a critic's values"):
        call_advantages(episodes, rule="value")


@pytest.mark.parametrize("rule", ["identical", "turn", "leave_one_out"])
def test_what_is_not_finite_is_refused_before_it_spoils_a_group(rule: Any) -> None:
    for bad in (episode("g", float("nan"), 0.0), episode("g", 1.0, float("inf"))):
        with pytest.raises(ValueError, match="not finite"):
            call_advantages([bad, episode("g", 1.0, 0.0)], rule=rule)


@pytest.mark.parametrize("rule", ["identical", "turn", "leave_one_out"])
def test_nothing_to_credit_is_no_error(rule: Any) -> None:
    assert call_advantages([], rule=rule) == []
    assert [len(each) for each in call_advantages([episode("g", 1.0), episode("g", 0.0)], rule=rule)] == [0, 0]
