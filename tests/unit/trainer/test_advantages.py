"""Advantages against a loop over rollouts, and the cases that quietly spoil a run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import advantages as reference
from trainer.data.advantages import group_advantages, rloo_advantages

rollouts = st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(0, 3)), min_size=1, max_size=30)


@given(rollouts, st.sampled_from(["none", "std"]))
def test_group_advantages_equal_the_loop(pairs, scale):
    rewards, groups = [reward for reward, _ in pairs], [group for _, group in pairs]
    expected = reference.group_advantages(rewards, groups, scale=scale)
    # Where a group is constant but for rounding, dividing by its spread magnifies that rounding; 1e-4 of
    # 1/1e-6.
    np.testing.assert_allclose(group_advantages(rewards, groups, scale=scale), expected, rtol=1e-5, atol=1e-4)


@given(rollouts)
def test_rloo_advantages_equal_the_loop(pairs):
    rewards, groups = [reward for reward, _ in pairs], [group for _, group in pairs]
    np.testing.assert_allclose(
        rloo_advantages(rewards, groups), reference.rloo_advantages(rewards, groups), rtol=1e-5, atol=1e-4
    )


@given(rollouts)
def test_advantages_sum_to_zero_within_a_group(pairs):
    groups = np.array([group for _, group in pairs])
    advantages = group_advantages([reward for reward, _ in pairs], groups)
    for group in set(groups):
        assert abs(advantages[groups == group].sum()) < 1e-3


def test_a_lone_rollout_gets_zero_and_not_its_raw_reward():
    for estimate in (group_advantages, rloo_advantages):
        assert estimate([7.0, 1.0, 0.0], ["alone", "b", "b"])[0] == 0
    assert group_advantages([7.0], ["alone"], scale="std")[0] == 0


def test_groups_may_be_named_by_anything_hashable_in_any_order():
    np.testing.assert_array_equal(group_advantages([1, 0, 0, 2], ["b", "a", "b", "a"]), [0.5, -1, -0.5, 1])


def test_a_reward_that_is_not_finite_is_refused_with_its_index():
    with pytest.raises(ValueError, match="reward nan at index 2"):
        group_advantages([1.0, 0.0, float("nan")], [0, 0, 0])


def test_lengths_that_differ_and_unknown_scales_are_refused():
    with pytest.raises(ValueError, match="groups have length 1"):
        group_advantages([1.0, 0.0], [0])
    with pytest.raises(ValueError, match="'none' or 'std'"):
        group_advantages([1.0], [0], scale="mad")  # pyright: ignore[reportArgumentType]


def test_no_rollouts_have_no_advantages():
    assert group_advantages([], []).shape == (0,)
