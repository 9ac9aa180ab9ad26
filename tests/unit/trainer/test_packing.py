"""Bins and batches: nothing lost, nothing over budget, and t scores t + 1 of its own row only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.rows import make_rows
from trainer.data.batch import pack_rows
from trainer.data.packing import plan_packs


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 200))
def test_every_row_lands_in_one_bin_and_no_bin_is_over_budget(lengths, budget):
    bins = plan_packs(lengths, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= budget for members in bins)
    assert all(members == sorted(members) for members in bins)
    assert bins == plan_packs(list(lengths), budget)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(64, 200))
def test_first_fit_leaves_at_most_one_bin_half_empty(lengths, budget):
    num_bins = len(plan_packs(lengths, budget))
    assert num_bins <= 2 * sum(lengths) / budget + 1


def test_bins_are_equally_heavy_where_the_rows_allow_it():
    bins = plan_packs([100] * 12, 600)
    assert [len(members) for members in bins] == [6, 6]
    costs = [sum((10 + 1000 * (index < 4)) for index in members) for members in plan_packs([1010] * 4 + [10] * 8, 2100)]
    assert max(costs) - min(costs) <= 20


def test_a_row_longer_than_the_budget_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="row 1 has 65 tokens, token_budget is 64"):
        plan_packs([3, 65], 64)
    with pytest.raises(ValueError, match="row 0 has 0 tokens"):
        plan_packs([0], 64)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=12), st.integers(20, 50), st.booleans())
def test_a_batch_says_of_every_trained_token_what_its_row_says(lengths, budget, by_token):
    rows = make_rows(1, lengths)
    advantages = np.arange(len(rows), dtype=np.float32)
    expected_of = [np.full(len(row.token_ids), advantage) for row, advantage in zip(rows, advantages, strict=True)]
    if by_token:
        expected_of = [advantage + np.arange(len(advantage), dtype=np.float32) / 100 for advantage in expected_of]
        rows = [replace(row, advantages=advantage) for row, advantage in zip(rows, expected_of, strict=True)]
    found = []
    for pack in pack_rows(rows, None if by_token else advantages, token_budget=budget):
        starts = np.cumsum([0, *pack.row_lengths])
        for t in range(pack.num_tokens):
            k = int(pack.row_T[t])
            row, position = rows[pack.row_indices[k]], int(pack.positions_T[t])
            assert position == t - starts[k]
            assert pack.token_ids_T[t] == row.token_ids[position]
            if pack.trained_T[t]:
                assert row.trained[position + 1]  # an IndexError here would be a token scored across rows
                assert pack.targets_T[t] == row.token_ids[position + 1]
                assert pack.logprobs_T[t] == row.logprobs[position + 1]
                assert pack.temperatures_T[t] == row.temperatures[position + 1]
                assert pack.advantages_T[t] == expected_of[pack.row_indices[k]][position + 1]
                found.append((pack.row_indices[k], position + 1))
    expected = [(k, int(t)) for k, row in enumerate(rows) for t in np.flatnonzero(row.trained)]
    assert sorted(found) == expected


def test_rollout_weights_sum_to_the_number_of_rollouts_however_many_rows_each_has():
    rows = make_rows(2, [10, 14, 30, 9])
    rows[3] = replace(rows[3], rollout_id=rows[0].rollout_id)
    for normalise, expected in (("token", sum(row.trained.sum() for row in rows)), ("rollout", 3)):
        packs = pack_rows(rows, np.ones(4), token_budget=40, normalise=normalise)
        total = sum(float(pack.weights_T[pack.trained_T].sum()) for pack in packs)
        assert total == pytest.approx(expected, rel=1e-6)


def test_garbage_beside_untrained_tokens_never_reaches_the_batch():
    (row,) = make_rows(3, [16])
    noise = np.where(row.trained, row.logprobs, np.nan).astype(np.float32)
    cold = np.where(row.trained, row.temperatures, 0).astype(np.float32)
    (pack,) = pack_rows([replace(row, logprobs=noise, temperatures=cold)], [1.0], token_budget=16)
    assert torch.isfinite(pack.logprobs_T).all()
    assert (pack.temperatures_T > 0).all()


def test_supervised_training_may_override_the_recorded_temperature():
    (row,) = make_rows(3, [16])
    (pack,) = pack_rows([replace(row, temperatures=np.zeros(16, np.float32))], [1.0], token_budget=16, temperature=1.0)
    assert (pack.temperatures_T == 1).all()


def test_rows_that_cannot_be_scored_are_refused():
    (row,) = make_rows(4, [16])
    with pytest.raises(ValueError, match="trains no token"):
        pack_rows([replace(row, trained=np.zeros(16, np.bool_))], [1.0], token_budget=16)
    with pytest.raises(ValueError, match="trains its first token"):
        pack_rows([replace(row, trained=np.ones(16, np.bool_))], [1.0], token_budget=16)
    with pytest.raises(ValueError, match="temperature 0.0"):
        pack_rows([replace(row, temperatures=np.zeros(16, np.float32))], [1.0], token_budget=16)
    with pytest.raises(ValueError, match="one per row"):
        pack_rows([row], [1.0, 2.0], token_budget=16)
    with pytest.raises(ValueError, match="not finite"):
        pack_rows([row], [float("nan")], token_budget=16)
    with pytest.raises(ValueError, match="1 of 1 rows carry no advantage"):
        pack_rows([row], token_budget=16)
    with pytest.raises(ValueError, match="'token' or 'rollout'"):
        pack_rows([row], [1.0], token_budget=16, normalise="turn")  # pyright: ignore[reportArgumentType]
