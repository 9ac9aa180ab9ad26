"""Every drop has a reason and is counted; order is kept; nothing else changes."""

from collections import Counter
from dataclasses import replace

import numpy as np

from lightning_bus.adapters import Episode, ScoredRollout
from tests.reference.rows import make_rows
from trainer.data.filters import (
    drop_failed,
    drop_impossible,
    drop_long,
    drop_stale,
    drop_uninformative,
    drop_unscored,
)


def scored(name: str, group: str, reward: float | None) -> ScoredRollout:
    return ScoredRollout(rollout_id=name, group=group, reward=reward)


def test_a_failed_rollout_is_dropped_and_not_a_reward_of_zero():
    zero, failed, broken = scored("a", "g", 0.0), scored("b", "g", None), scored("c", "g", float("nan"))
    kept = drop_failed([failed, zero, broken])
    assert kept.items == [zero]
    assert kept.dropped == Counter(failed=1, nonfinite_reward=1)


def test_groups_that_cannot_teach_leave_before_the_batch_is_counted():
    rollouts = [
        scored("a", "x", 1.0),
        scored("b", "y", 0.0),
        scored("c", "x", 0.0),
        scored("d", "y", 0.0),
        scored("e", "z", 1.0),
    ]
    kept = drop_uninformative(rollouts)
    assert [rollout.rollout_id for rollout in kept.items] == ["a", "c"]
    assert kept.dropped == Counter(zero_variance_group=2, singleton_group=1)


def earning(name: str, reward: float, *own: float) -> ScoredRollout:
    return ScoredRollout(name, "g", reward, episode=Episode("g", reward, np.array(own)))


def test_a_return_is_the_reward_and_what_turns_earned() -> None:
    alike, other = earning("a", 1.0, 0.5, 0.0), earning("b", 1.5, 0.0)
    assert (alike.total, other.total) == (1.5, 1.5)
    assert drop_uninformative([alike, other]).dropped == Counter(zero_variance_group=2)
    assert drop_uninformative([alike, other], by_turn=True).items == [alike, other]
    even = [earning("a", 1.0, 0.0, 0.0), earning("b", 1.0, 0.0)]
    assert drop_uninformative(even, by_turn=True).dropped == Counter(zero_variance_group=2)
    assert drop_failed([earning("a", 1.0, float("nan"))]).dropped == Counter(nonfinite_reward=1)


def test_what_no_model_can_have_sampled_is_dropped() -> None:
    whole, negative, greedy, unclear = make_rows(0, [8, 8, 8, 8])
    ids = negative.token_ids.copy()
    ids[2] = -5
    negative = replace(negative, token_ids=ids)
    greedy = replace(greedy, temperatures=np.zeros(8, np.float32))
    unclear = replace(unclear, temperatures=np.full(8, np.nan, np.float32))
    kept = drop_impossible([whole, negative, greedy, unclear])
    assert kept.items == [whole]
    assert kept.dropped == Counter(token_id_out_of_range=1, greedy=2)


def test_staleness_counts_from_the_oldest_trained_token():
    fresh, mixed = make_rows(0, [8, 8])
    fresh = replace(fresh, version_oldest=5, version_newest=5)
    mixed = replace(mixed, version_oldest=3, version_newest=6)
    assert drop_stale([fresh, mixed], trainer_version=6, staleness_max=3).dropped == Counter()
    kept = drop_stale([fresh, mixed], trainer_version=6, staleness_max=2)
    assert kept.items == [fresh]
    assert kept.dropped == Counter(stale=1)


def test_rows_that_no_policy_sampled_are_not_taken_for_fresh_ones():
    (row,) = make_rows(0, [8])
    kept = drop_stale([replace(row, version_oldest=-1)], trainer_version=0, staleness_max=2)
    assert kept.items == []
    assert kept.dropped == Counter(unnumbered_version=1)


def test_rows_over_the_limit_are_dropped_whole():
    rows = make_rows(0, [8, 9, 7])
    kept = drop_long(rows, tokens_max=8)
    assert kept.items == [rows[0], rows[2]]
    assert kept.dropped == Counter(too_long=1)


def test_a_token_without_a_finite_behaviour_logprob_is_not_trained():
    row, hopeless, whole = make_rows(0, [12, 12, 12])
    first = int(np.flatnonzero(row.trained)[0])
    logprobs = row.logprobs.copy()
    logprobs[first] = -np.inf
    hopeless = replace(hopeless, logprobs=np.full(12, np.nan, np.float32))
    kept = drop_unscored([replace(row, logprobs=logprobs), hopeless, whole])
    assert len(kept.items) == 2
    assert kept.items[1] is whole
    assert kept.dropped == Counter(nonfinite_logprob_token=1 + int(hopeless.trained.sum()), untrained=1)
    assert not kept.items[0].trained[first]
    assert kept.items[0].trained.sum() == row.trained.sum() - 1
    assert np.isfinite(kept.items[0].logprobs).all()
