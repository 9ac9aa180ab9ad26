"""Bins for several ranks: as many for each, and as even as brute force finds them, up to LPT's bound."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import QUADRATIC_TOKENS, plan_packs


def cost(lengths):
    return sum(length + length * length / QUADRATIC_TOKENS for length in lengths)


def rounds(bins, ranks):
    return [bins[first : first + ranks] for first in range(0, len(bins), ranks)]


@given(st.lists(st.integers(1, 64), max_size=40), st.integers(64, 200), st.integers(1, 5))
def test_every_rank_gets_as_many_bins_and_every_row_is_in_one_within_the_budget(lengths, budget, ranks):
    bins = plan_packs(lengths, budget, ranks=ranks)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= budget for members in bins)
    assert len(bins) % ranks == 0
    assert len(bins) < len(plan_packs(lengths, budget)) + ranks  # no more than the ranks make necessary
    assert bins == plan_packs(list(lengths), budget, ranks=ranks)
    costs = [cost(lengths[index] for index in members) for members in bins]
    assert costs == sorted(costs, reverse=True)
    if lengths:
        assert bins[0]  # rank 0 always has something to say
    if len(lengths) >= len(bins):
        assert all(bins)  # nobody idles while another rank has two rows


@settings(max_examples=40)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=7), st.integers(2, 3))
def test_the_heaviest_rank_is_within_a_third_of_the_best_plan(lengths, ranks):
    bins = plan_packs(lengths, sum(lengths), ranks=ranks)
    best = min(
        max(cost(length for length, of in zip(lengths, owner, strict=True) if of == rank) for rank in range(ranks))
        for owner in itertools.product(range(ranks), repeat=len(lengths))
    )
    heaviest = max(cost(lengths[index] for index in members) for members in bins)
    assert heaviest <= best * (4 / 3 - 1 / (3 * ranks)) * (1 + 1e-9)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=24), st.integers(2, 3))
def test_no_other_order_of_the_bins_lets_ranks_wait_less_for_each_other(lengths, ranks):
    bins = plan_packs(lengths, 64, ranks=ranks)[: 2 * ranks]
    costs = [cost(lengths[index] for index in members) for members in bins]

    def waited(order):
        return sum(max(together) for together in rounds(list(order), ranks))

    assert waited(costs) <= min(waited(order) for order in itertools.permutations(costs)) + 1e-6


def test_ranks_must_be_at_least_one():
    with pytest.raises(ValueError, match="ranks=0"):
        plan_packs([3], 64, ranks=0)
