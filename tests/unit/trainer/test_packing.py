"""Bins and batches: nothing lost, nothing over budget, and t scores t + 1 of its own row only."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.rows import make_rows
from trainer.data.batch import Normalise, pack_rows
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


def test_the_denominator_counts_what_the_loss_is_a_mean_over():
    rows = [replace(row, group=f"g-{k % 2}") for k, row in enumerate(make_rows(2, [10, 14, 30, 9]))]
    rows[3] = replace(rows[3], rollout_id=rows[0].rollout_id)
    tokens = sum(int(row.trained.sum()) for row in rows)
    for normalise, length, expected in (
        ("token", None, tokens), ("sequence", None, 4), ("rollout", None, 3), ("group", None, 2), ("fixed", 100, 300),
    ):  # fmt: skip
        packs = pack_rows(rows, np.ones(4), token_budget=40, normalise=normalise, fixed_length=length)
        assert sum(pack.denominator for pack in packs) == pytest.approx(expected, rel=1e-12)
        total = sum(float(pack.weights_T[pack.trained_T].sum()) for pack in packs)
        assert total == pytest.approx(tokens if normalise == "fixed" else expected, rel=1e-6)


def test_equally_long_rows_weigh_the_same_whatever_the_loss_is_a_mean_over():
    rows = make_rows(2, [12] * 4)
    lengths = {normalise: 12 if normalise == "fixed" else None for normalise in get_args(Normalise)}
    shares = {}
    for normalise, length in lengths.items():
        packs = pack_rows(rows, np.ones(4), token_budget=24, normalise=normalise, fixed_length=length)
        weights = torch.cat([pack.weights_T[pack.trained_T] for pack in packs])
        shares[normalise] = weights / sum(pack.denominator for pack in packs)
        assert len(set(weights.tolist())) == 1
    for normalise in ("sequence", "rollout", "group"):
        torch.testing.assert_close(shares[normalise], shares["token"])


def test_a_token_knows_how_old_the_weights_are_that_sampled_it():
    rows = make_rows(2, [5, 6, 7])
    rows = [replace(row, version_oldest=oldest) for row, oldest in zip(rows, (4, 2, -1), strict=True)]
    (pack,) = pack_rows(rows, np.ones(3), token_budget=18, version=4)
    of_row = [pack.staleness_T[pack.trained_T & (pack.row_T == k)].tolist() for k in range(3)]
    assert [set(ages) for ages in of_row] == [{0}, {2}, {-1}]
    (pack,) = pack_rows(rows, np.ones(3), token_budget=18)
    assert set(pack.staleness_T.tolist()) == {-1}


def test_calls_of_one_row_are_each_as_old_as_the_weights_that_sampled_them():
    (row,) = make_rows(2, [12])  # trains tokens 3 to 5 and 9 to 11
    row = replace(row, span_ids=(b"1", b"2"), sampled=((3, 6), (9, 12)), versions=(2, 5), version_oldest=2)
    (pack,) = pack_rows([row], np.ones(1), token_budget=18, version=5)
    assert pack.staleness_T[pack.trained_T].tolist() == [3, 3, 3, 0, 0, 0]
    (pack,) = pack_rows([replace(row, versions=(-1, 7))], np.ones(1), token_budget=18, version=5)
    assert pack.staleness_T[pack.trained_T].tolist() == [-1, -1, -1, 0, 0, 0]


def test_logprobs_of_other_policies_land_on_the_tokens_that_they_are_of():
    (pack,) = pack_rows(make_rows(2, [9, 12]), np.ones(2), token_budget=21)
    scored_K = torch.arange(int(pack.trained_T.sum()), dtype=torch.float32).requires_grad_()
    both = pack.with_logprobs(reference_K=-scored_K).with_logprobs(proximal_K=scored_K)
    assert both.reference_logprobs_T is not None and both.proximal_logprobs_T is not None
    assert not both.reference_logprobs_T.requires_grad
    torch.testing.assert_close(both.reference_logprobs_T[pack.trained_T], -scored_K.detach())
    torch.testing.assert_close(both.proximal_logprobs_T[pack.trained_T], scored_K.detach())


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
    with pytest.raises(ValueError, match="use one of token, sequence, rollout, group, fixed"):
        pack_rows([row], [1.0], token_budget=16, normalise="turn")  # pyright: ignore[reportArgumentType]
    for normalise, length in (("fixed", None), ("token", 5), ("fixed", 0)):
        with pytest.raises(ValueError, match="fixed_length="):
            pack_rows([row], [1.0], token_budget=16, normalise=normalise, fixed_length=length)
    for bad in (np.nan, -np.inf):
        unknown = replace(row, logprobs=np.where(row.trained, bad, 0).astype(np.float32))
        with pytest.raises(ValueError, match="trained tokens whose log-prob is not finite"):
            pack_rows([unknown], [1.0], token_budget=16)
