"""Advantages against a loop over rollouts, and the cases that quietly spoil a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.adapters import advantages as module
from lightning_bus.adapters.advantages import (
    dr_grpo_advantages,
    gae,
    gae_batch,
    group_advantages,
    maxrl_advantages,
    reinforce_pp_advantages,
    rloo_advantages,
    rollout_advantages,
)
from tests.reference import advantages as reference

rollouts = st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(0, 3)), min_size=1, max_size=30)
successes = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.5]), st.integers(0, 3)), min_size=1, max_size=30)
NAMES: list[Any] = ["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "maxrl"]


def split(pairs: list[tuple[float, int]]) -> tuple[list[float], list[int]]:
    return [reward for reward, _ in pairs], [group for _, group in pairs]


@given(rollouts, st.sampled_from(["none", "std"]))
def test_group_advantages_equal_the_loop(pairs: Any, scale: Any) -> None:
    rewards, groups = split(pairs)
    expected = reference.group_advantages(rewards, groups, scale=scale)
    # Where a group is constant but for rounding, dividing by its spread magnifies that rounding; 1e-4 of
    # 1/1e-6.
    np.testing.assert_allclose(group_advantages(rewards, groups, scale=scale), expected, rtol=1e-5, atol=1e-4)


@given(rollouts)
def test_rloo_advantages_equal_the_loop(pairs: Any) -> None:
    rewards, groups = split(pairs)
    expected = reference.rloo_advantages(rewards, groups)
    np.testing.assert_allclose(rloo_advantages(rewards, groups), expected, rtol=1e-5, atol=1e-4)


@given(rollouts, st.booleans())
def test_reinforce_pp_advantages_equal_the_loop(pairs: Any, grouped: bool) -> None:
    rewards, groups = split(pairs)
    expected = reference.reinforce_pp_advantages(rewards, groups if grouped else None)
    found = reinforce_pp_advantages(rewards, groups if grouped else None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@given(successes)
def test_maxrl_advantages_equal_the_loop(pairs: Any) -> None:
    rewards, groups = split(pairs)
    expected = reference.maxrl_advantages(rewards, groups)
    np.testing.assert_allclose(maxrl_advantages(rewards, groups), expected, rtol=1e-5, atol=1e-5)


@given(successes, st.sampled_from(NAMES))
def test_baseline_and_scale_are_those_of_the_advantages(pairs: Any, name: Any) -> None:
    rewards, groups = split(pairs)
    compared = module.comparison(rewards, groups, estimator=name)
    by_hand = np.where(compared.known_N, (np.array(rewards) - compared.baseline_N) / compared.scale_N, 0)
    np.testing.assert_allclose(rollout_advantages(rewards, groups, estimator=name), by_hand, rtol=1e-5, atol=1e-5)


@given(rollouts)
def test_advantages_sum_to_zero_within_a_group(pairs: Any) -> None:
    rewards, groups = split(pairs)
    for advantages in (dr_grpo_advantages(rewards, groups), rloo_advantages(rewards, groups)):
        for group in set(groups):
            assert abs(advantages[np.array(groups) == group].sum()) < 1e-3


def test_maxrl_makes_the_one_success_of_a_hard_task_count_more() -> None:
    hard, easy = maxrl_advantages([1, 0, 0, 0], [0] * 4), maxrl_advantages([1, 1, 1, 0], [0] * 4)
    assert hard.tolist() == [3, -1, -1, -1]
    assert easy[0] == pytest.approx(1 / 3)
    assert maxrl_advantages([0, 0], [0, 0]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="reward -1 is negative"):
        maxrl_advantages([-1.0, 1.0], [0, 0])


def test_reinforce_pp_whitens_over_the_batch_and_not_within_a_group() -> None:
    found = reinforce_pp_advantages([0, 1, 10, 11], ["easy", "easy", "rich", "rich"])
    np.testing.assert_allclose(found, [-1, 1, -1, 1], rtol=1e-5)
    whitened = reinforce_pp_advantages([0.0, 1.0, 10.0, 11.0])
    assert abs(whitened.mean()) < 1e-6
    assert whitened.std() == pytest.approx(1, rel=1e-5)
    assert reinforce_pp_advantages([5.0]).tolist() == [0.0]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reinforce++"])
def test_a_lone_rollout_gets_zero_and_not_its_raw_reward(name: Any) -> None:
    assert rollout_advantages([7.0, 1.0, 0.0], ["alone", "b", "b"], estimator=name)[0] == 0
    assert group_advantages([7.0], ["alone"], scale="std")[0] == 0


def test_groups_may_be_named_by_anything_hashable_in_any_order() -> None:
    np.testing.assert_array_equal(group_advantages([1, 0, 0, 2], ["b", "a", "b", "a"]), [0.5, -1, -0.5, 1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_with_its_index(name: Any, value: float) -> None:
    with pytest.raises(ValueError, match=f"reward {value} at index 2"):
        rollout_advantages([1.0, 0.0, value], [0, 0, 0], estimator=name)


def test_lengths_that_differ_and_unknown_names_are_refused() -> None:
    bad: Any = "mad"
    with pytest.raises(ValueError, match="groups have length 1"):
        group_advantages([1.0, 0.0], [0])
    with pytest.raises(ValueError, match="'none' or 'std'"):
        group_advantages([1.0], [0], scale=bad)
    with pytest.raises(ValueError, match="use one of grpo, dr_grpo"):
        rollout_advantages([1.0], [0], estimator=bad)


@pytest.mark.parametrize("name", NAMES)
def test_no_rollouts_have_no_advantages(name: Any) -> None:
    assert rollout_advantages([], [], estimator=name).shape == (0,)


# -- generalised advantage estimation

steps = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=12)
shares = st.floats(0, 1)


@given(steps, shares, shares, st.floats(-5, 5))
def test_gae_equals_the_sums_written_out(pairs: Any, gamma: float, lambda_: float, bootstrap: float) -> None:
    rewards, values = split(pairs)
    found = gae(rewards, values, gamma=gamma, lambda_=lambda_, bootstrap=bootstrap)
    expected = reference.gae(rewards, values, gamma, lambda_, bootstrap)
    np.testing.assert_allclose(found.advantages_T, expected, atol=1e-9)
    np.testing.assert_allclose(found.targets_T, found.advantages_T + values, atol=1e-9)


@given(steps, shares, st.floats(-5, 5))
def test_with_lambda_one_the_targets_are_the_discounted_returns(pairs: Any, gamma: float, bootstrap: float) -> None:
    rewards, values = split(pairs)
    returns = [bootstrap]
    for reward in reversed(rewards):
        returns.insert(0, reward + gamma * returns[0])
    found = gae(rewards, values, gamma=gamma, lambda_=1.0, bootstrap=bootstrap)
    np.testing.assert_allclose(found.targets_T, returns[:-1], atol=1e-9)


@given(steps, shares, shares, st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_what_lies_between_actions_neither_discounts_nor_counts(
    pairs: Any, gamma: float, lambda_: float, gaps: list[int]
) -> None:
    """Tokens of a tool's answer, with whatever a critic says of them: as if they were not there."""
    rewards, values = split(pairs)
    long_rewards, long_values, acted = [], [], []
    for reward, value, gap in zip(rewards, values, gaps, strict=False):
        # What is earned while the tool runs is the action's before it.
        long_rewards += [reward, *[0.0] * gap] if gap == 0 else [0.0, *[0.0] * (gap - 1), reward]
        long_values += [value, *[99.0] * gap]
        acted += [True, *[False] * gap]
    found = gae(long_rewards, long_values, gamma=gamma, lambda_=lambda_, acted_T=acted)
    dense = gae(rewards, values, gamma=gamma, lambda_=lambda_)
    np.testing.assert_allclose(found.advantages_T[acted], dense.advantages_T, atol=1e-9)
    np.testing.assert_allclose(found.targets_T[acted], dense.targets_T, atol=1e-9)
    assert not found.advantages_T[~np.array(acted)].any()


def test_gae_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        gae([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        gae([float("nan")], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        gae([1.0], [1.0], bootstrap=float("inf"))
    assert gae([1.0, 1.0], [0.5, float("nan")], acted_T=[True, False]).advantages_T.tolist() == [1.5, 0.0]


sequences = st.lists(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), shares, shares), max_size=9), min_size=0, max_size=6
)


@given(sequences, st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_gae_of_many_sequences_equals_the_sums_written_out_of_each(made: Any, ends: list[float]) -> None:
    columns = [[[step[k] for step in one] for one in made] for k in range(4)]
    rewards, values, gammas, lambdas = columns
    found = gae_batch(rewards, values, gammas=gammas, lambdas=lambdas, bootstraps_N=ends[: len(made)])
    assert len(found) == len(made)
    for n, one in enumerate(found):
        expected = reference.gae_by_step(rewards[n], values[n], gammas[n], lambdas[n], ends[n])
        np.testing.assert_allclose(one.advantages_T, expected, atol=1e-9)
        np.testing.assert_allclose(one.targets_T, one.advantages_T + values[n], atol=1e-9)


@given(st.lists(steps, min_size=1, max_size=5), shares, shares, st.floats(-5, 5))
def test_gae_of_many_equals_gae_of_one(many: Any, gamma: float, lambda_: float, end: float) -> None:
    rewards, values = [split(one)[0] for one in many], [split(one)[1] for one in many]
    found = gae_batch(rewards, values, gammas=gamma, lambdas=lambda_, bootstraps_N=[end] * len(many))
    for n, one in enumerate(found):
        alone = gae(rewards[n], values[n], gamma=gamma, lambda_=lambda_, bootstrap=end)
        np.testing.assert_allclose(one.advantages_T, alone.advantages_T, atol=1e-9)


def test_gae_of_many_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="1 sequences of rewards and 2 of values"):
        gae_batch([[1.0]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="they must fit"):
        gae_batch([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="bootstrap values of shape"):
        gae_batch([[1.0]], [[1.0]], bootstraps_N=[0.0, 0.0])
    with pytest.raises(ValueError, match="not finite"):
        gae_batch([[1.0]], [[float("nan")]])
    with pytest.raises(ValueError, match="not finite"):
        gae_batch([[1.0]], [[1.0]], bootstraps_N=[float("inf")])
