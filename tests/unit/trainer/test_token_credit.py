"""Credit by token against the loop that walks over every token, and what of it must not be lost or made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import trajectories as reference
from tests.reference.trajectories import Said, conversation, rollout_of, scored_rollouts
from trainer.algorithms.token_credit import token_credit, turn_credit, whitened

seeds = st.integers(0, 10_000)
shares = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def a_batch(seed: int, count: int = 4) -> tuple[Any, Any, Any]:
    """Rollouts of up to five calls, forks and calls without log-probs among them; their rows; a critic's values."""
    rng = np.random.default_rng(seed)
    rollouts = [
        rollout_of(f"r-{n}", conversation(rng, int(rng.integers(1, 6)), fork=0.3), float(rng.normal()))
        for n in range(count)
    ]
    batch = scored_rollouts(rollouts)
    rows = [row for rollout in batch for row in rollout.rows]
    values = [rng.normal(size=len(row.token_ids)).astype(np.float32) for row in rows]
    return batch, rows, values


def rows_of(batch: Any, n: int) -> range:
    first = sum(len(one.rows) for one in batch[:n])
    return range(first, first + len(batch[n].rows))


@given(seeds, shares, shares, st.sampled_from(["token", "turn"]))
def test_credit_by_token_equals_the_walk_over_every_token(seed: int, gamma: float, lambda_: float, level: Any) -> None:
    batch, rows, values = a_batch(seed)
    found = token_credit(batch, rows, values, gamma=gamma, lambda_=lambda_, level=level)
    for n, rollout in enumerate(batch):
        own = {k: values[at] for k, at in enumerate(rows_of(batch, n))}
        expected = reference.token_credit(
            rollout, own, gamma=gamma, lambda_=lambda_, by_turn=level == "turn", cut_off=False
        )
        advantage_of = {
            turn.span_id: one for turn, one in zip(rollout.transitions.turns, found.advantages[n], strict=True)
        }
        seen = 0
        for k, at in enumerate(rows_of(batch, n)):
            for span_id, (start, end) in zip(rows[at].span_ids, rows[at].sampled, strict=True):
                for token in range(start, end):
                    advantage, target = expected[k, token]
                    assert advantage_of[span_id][token - start] == pytest.approx(advantage, abs=1e-4)
                    assert found.targets[at][token] == pytest.approx(target, abs=1e-4)
                    seen += 1
            assert not found.targets[at][~rows[at].trained].any()
        assert seen == len(expected)


@given(seeds)
def test_values_of_tokens_that_the_policy_did_not_sample_are_not_read(seed: int) -> None:
    batch, rows, values = a_batch(seed)
    read = [np.append(row.trained[1:], False) for row in rows]  # the state after t is the one before t + 1
    poisoned = [np.where(known, one, np.nan).astype(np.float32) for known, one in zip(read, values, strict=True)]
    clean, found = (token_credit(batch, rows, each, lambda_=0.5) for each in (values, poisoned))
    for one, other in zip(clean.targets, found.targets, strict=True):
        np.testing.assert_array_equal(one, other)


@given(seeds)
def test_without_discount_the_first_target_is_all_that_was_earned_from_there_on(seed: int) -> None:
    batch, rows, values = a_batch(seed)
    for found in (token_credit(batch, rows, values), turn_credit(batch, rows, values)):
        for n, rollout in enumerate(batch):
            turns = rollout.transitions.turns
            first = next((k for k, turn in enumerate(turns) if not turn.left_out), None)
            if first is None:
                continue
            earned = rollout.episode.final + sum(turn.reward for turn in turns[first:])
            at, start = next(
                (at, row_start)
                for at in rows_of(batch, n)
                for span_id, (row_start, _) in zip(rows[at].span_ids, rows[at].sampled, strict=True)
                if span_id == turns[first].span_id
            )
            assert found.targets[at][start] == pytest.approx(earned, abs=1e-4)


@given(seeds, shares, shares)
def test_credit_by_turn_is_gae_over_the_turns_that_are_in_rows(seed: int, gamma: float, lambda_: float) -> None:
    """The twin: a rollout in which every call said one token has a turn for each token."""
    rng = np.random.default_rng(seed)
    calls = [replace(one, response=one.response[:1]) for one in conversation(rng, 4, fork=1.0)]
    batch = scored_rollouts([rollout_of("r-0", calls, 1.0)])
    rows = list(batch[0].rows)
    values = [rng.normal(size=len(row.token_ids)).astype(np.float32) for row in rows]
    turns = turn_credit(batch, rows, values, gamma=gamma, lambda_=lambda_)
    tokens = token_credit(batch, rows, values, gamma=gamma, lambda_=lambda_)
    for one, other in zip(turns.advantages[0], tokens.advantages[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(turns.targets, tokens.targets, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rewards_land_on_the_last_token_of_their_call_and_the_final_one_on_the_last_of_all() -> None:
    calls = [Said([1, 2], [3, 4], 0.25), Said([1, 2, 3, 4, 9], [5, 6, 7])]
    batch = scored_rollouts([rollout_of("r-0", calls, 1.0)])
    (row,) = batch[0].rows
    found = token_credit(batch, [row], [np.zeros(8, np.float32)], lambda_=0.0)
    assert found.targets[0].tolist() == [0, 0, 0, 0.25, 0, 0, 0, 1.0]
    assert [one.tolist() for one in found.advantages[0]] == [[0, 0.25], [0, 0, 1.0]]


@pytest.mark.parametrize(
    ("finish", "bootstrap", "expected"),
    [
        ("stop", "length", 1.0),
        ("length", "length", 1.5),
        ("length", "never", 1.0),
        ("tool_calls", "length", 1.0),
        ("tool_calls", "turns", 1.5),
    ],
)
def test_where_a_rollout_was_cut_off_the_critic_says_what_might_have_come(
    finish: str, bootstrap: Any, expected: float
) -> None:
    batch = scored_rollouts([rollout_of("r-0", [Said([1, 2], [3, 4], finish=finish)], 1.0)])
    values = [np.array([0, 0.1, 0.2, 0.5], np.float32)]
    for how in (token_credit, turn_credit):
        found = how(batch, list(batch[0].rows), values, bootstrap=bootstrap)
        assert found.targets[0][2:].tolist() == pytest.approx([expected, expected])
        assert found.cut_off == (expected > 1)


def test_an_answer_cut_off_in_the_middle_of_a_rollout_ends_nothing() -> None:
    calls = [Said([1, 2], [3, 4], finish="length"), Said([1, 2, 3, 4, 9], [5])]
    batch = scored_rollouts([rollout_of("r-0", calls, 1.0)])
    found = token_credit(batch, list(batch[0].rows), [np.full(6, 7.0, np.float32)])
    assert (found.cut_off, found.targets[0][-1]) == (0, 1.0)


@given(seeds)
def test_whitened_advantages_have_mean_0_and_variance_1_over_all_trained_tokens(seed: int) -> None:
    _, rows, values = a_batch(seed)
    rows = [replace(row, advantages=one) for row, one in zip(rows, values, strict=True)]
    even = whitened(rows)
    every = np.concatenate([row.advantages[row.trained] for row in even] or [np.zeros(0)])
    if len(every) > 1:
        assert every.mean() == pytest.approx(0, abs=1e-5)
        assert every.std() == pytest.approx(1, abs=1e-4)
    assert all(not row.advantages[~row.trained].any() for row in even)


def test_advantages_that_are_all_equal_teach_nothing() -> None:
    _, rows, _ = a_batch(3)
    even = whitened([replace(row, advantages=np.full(len(row.token_ids), 2.5, np.float32)) for row in rows])
    assert not any(row.advantages.any() for row in even)


def test_what_cannot_be_placed_is_refused() -> None:
    batch, rows, values = a_batch(1)
    with pytest.raises(ValueError, match="does not say where"):
        token_credit(batch, [replace(rows[0], sampled=())], values)
    for option in ({"level": "word"}, {"bootstrap": "always"}):
        with pytest.raises(ValueError, match="is not known"):
            token_credit(batch, rows, values, **option)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="carry no advantages"):
        whitened(rows)
