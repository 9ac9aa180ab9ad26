"""Staleness: the policy that is improved, less the oldest version among the tokens that a row trains. Nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.adapters import Row
from lightning_bus.adapters.transitions import transitions_of
from lightning_bus.spans import (
    LOGPROBS,
    MODEL_CALL_NAME,
    OPERATION,
    PROMPT_IDS,
    RESPONSE_IDS,
    WEIGHT_VERSIONS,
    Span,
    pack_ids,
    pack_logprobs,
)
from tests.bus_fixtures import span
from trainer.data.filters import drop_stale

Parts = list[tuple[int, int]]  # (version, tokens) in order, of one answer


def call(prompt: list[int], parts: Parts) -> Span:
    """A call whose answer these versions sampled, token by token all the same id: 100 + the version."""
    response = [100 + version for version, tokens in parts for _ in range(tokens)]
    ends = np.cumsum([0, *(tokens for _, tokens in parts)]).tolist()
    versions = [[str(version), ends[at], ends[at + 1]] for at, (version, _) in enumerate(parts)]
    attributes: dict[str, Any] = {
        OPERATION: MODEL_CALL_NAME, PROMPT_IDS: pack_ids(prompt), RESPONSE_IDS: pack_ids(response),
        LOGPROBS: pack_logprobs([-0.5] * len(response)), WEIGHT_VERSIONS: versions,
    }  # fmt: skip
    return span("chat", "r-1", 1, **attributes)


parts = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=3).filter(
    lambda made: sum(tokens for _, tokens in made) > 0
)


@given(st.lists(st.tuples(st.booleans(), parts), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 6))
def test_a_row_is_as_old_as_its_oldest_trained_token(
    turns: list[tuple[bool, Parts]], trainer_version: int, staleness_max: int
) -> None:
    """Whatever merges, forks, or changes its weights in the middle of an answer. The slow twin looks at every token."""
    calls: list[Span] = []
    history: list[int] = []
    for goes_on, made in turns:
        prompt = [*history, 1] if goes_on else [2 + len(calls)]
        calls.append(call(prompt, made))
        history = [*prompt, *(100 + version for version, tokens in made for _ in range(tokens))]
    rows = transitions_of("r-1", 1, "g", calls).rows

    def ages(row: Row) -> list[int]:
        return [trainer_version - (int(token) - 100) for token in row.token_ids[row.trained]]

    for row in rows:
        assert trainer_version - row.version_oldest == max(ages(row))
        assert trainer_version - row.version_newest == min(ages(row))
        by_call = [min(int(token) - 100 for token in row.token_ids[start:end]) for start, end in row.sampled]
        assert list(row.versions) == by_call
    kept = drop_stale(rows, trainer_version=trainer_version, staleness_max=staleness_max).items
    expected = [row for row in rows if all(age <= staleness_max for age in ages(row))]
    assert [row.span_ids for row in kept] == [row.span_ids for row in expected]


@pytest.mark.parametrize(("forked", "kept"), [(False, 0), (True, 1)])
def test_an_old_call_takes_with_it_what_continues_it_and_no_fork(forked: bool, kept: int) -> None:
    """What continues an old answer was sampled in its company; a row of its own is judged by its own tokens."""
    old = call([1], [(3, 2)])
    fresh = call([7] if forked else [1, 103, 103, 7], [(8, 2)])
    rows = transitions_of("r-1", 1, "g", [old, fresh]).rows
    assert len(drop_stale(rows, trainer_version=8, staleness_max=2).items) == kept


def test_tokens_that_are_only_context_make_no_row_older() -> None:
    """A fork shows what an older row trains, and is not judged by it."""
    old, one, other = call([1], [(3, 1)]), call([1, 103, 5], [(8, 1)]), call([1, 103, 6], [(8, 1)])
    rows = transitions_of("r-1", 1, "g", [old, one, other]).rows
    assert [(row.version_oldest, row.version_newest) for row in rows] == [(3, 8), (8, 8)]
    assert 103 in rows[1].token_ids
