"""Spans of one attempt → rows to train on."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import spans as s
from lightning_bus.adapters.transitions import Transitions, transitions_of
from tests.bus_fixtures import span


def call(
    prompt: list[int],
    response: list[int],
    *,
    version: str = "1",
    temperature: float = 1.0,
    retry: int = 0,
    **extra: Any,
) -> s.Span:
    attributes: dict[str, Any] = {
        s.OPERATION: s.MODEL_CALL_NAME,
        s.PROMPT_IDS: s.pack_ids(prompt),
        s.RESPONSE_IDS: s.pack_ids(response),
        s.LOGPROBS: s.pack_logprobs([-token / 100 for token in response]),
        s.WEIGHT_VERSIONS: [[version, 0, len(response)]],
        s.TEMPERATURE: temperature,
        s.RETRY_COUNT: retry,
    }
    return span("chat", "r-1", 1, **(attributes | extra))


def rows_of(*calls: s.Span) -> Transitions:
    return transitions_of("r-1", 1, "g", calls)


def test_one_call_is_one_row() -> None:
    one = call([1, 2], [3, 4], version="7", temperature=0.5)
    (row,) = rows_of(span(), one).rows
    assert row.token_ids.tolist() == [1, 2, 3, 4]
    assert row.trained.tolist() == [False, False, True, True]
    assert np.allclose(row.logprobs, [0, 0, -0.03, -0.04])
    assert row.temperatures.tolist() == [1, 1, 0.5, 0.5]
    assert (row.rollout_id, row.attempt, row.group, row.span_ids) == ("r-1", 1, "g", (one.span_id,))
    assert (row.version_oldest, row.version_newest) == (7, 7)


def test_turns_that_continue_exactly_merge_and_the_tool_output_between_is_not_trained() -> None:
    (row,) = rows_of(call([1], [2], version="3"), call([1, 2, 9], [4], version="5")).rows
    assert row.token_ids.tolist() == [1, 2, 9, 4]
    assert row.trained.tolist() == [False, True, False, True]
    assert (row.version_oldest, row.version_newest) == (3, 5)


def test_one_token_off_forks() -> None:
    """Re-tokenised history is not what was sampled; trained on, it would be off-policy without anyone knowing."""
    rows = rows_of(call([1], [2, 3]), call([1, 2, 4, 9], [5])).rows
    assert [row.token_ids.tolist() for row in rows] == [[1, 2, 3], [1, 2, 4, 9, 5]]
    assert [row.trained.sum() for row in rows] == [2, 1]


def test_two_conversations_interleaved_are_two_rows() -> None:
    rows = rows_of(call([1], [2]), call([5], [6]), call([1, 2], [3]), call([5, 6, 7], [8])).rows
    assert [row.token_ids.tolist() for row in rows] == [[1, 2, 3], [5, 6, 7, 8]]


def test_samples_of_one_prompt_are_rows_of_their_own() -> None:
    rows = rows_of(call([1], [2]), call([1], [3]), call([1], [2])).rows
    assert [row.token_ids.tolist() for row in rows] == [[1, 2], [1, 3], [1, 2]]


def test_a_call_that_the_client_repeated_is_left_out_and_counted() -> None:
    got = rows_of(call([1], [2]), call([1], [3], retry=1))
    assert [row.token_ids.tolist() for row in got.rows] == [[1, 3]]
    assert got.calls == 2
    assert got.dropped == {"superseded by the client's retry": 1}


def test_untrainable_calls_are_left_out_with_their_reason() -> None:
    got = rows_of(call([1], []), call([1], [2], **{s.UNTRAINABLE: "cut off"}), call([1], [2], **{s.LOGPROBS: b"abc"}))
    assert got.rows == []
    assert got.dropped == {"token ids missing": 1, "cut off": 1, f"malformed: {s.LOGPROBS}": 1}


def test_a_model_without_numbered_versions_is_not_our_policy() -> None:
    (row,) = rows_of(call([1], [2], version="gpt-x")).rows
    assert (row.version_oldest, row.version_newest) == (-1, -1)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@given(st.lists(st.tuples(tokens, tokens, st.booleans()), max_size=8))
def test_every_sampled_token_is_trained_exactly_once(turns: list[tuple[list[int], list[int], bool]]) -> None:
    """Whatever continues, forks or repeats: the trained tokens of the rows are the responses, in each row's order."""
    calls: list[s.Span] = []
    history: list[int] = []
    for prompt, response, goes_on in turns:
        prompt = history + prompt if goes_on else prompt
        calls.append(call(prompt, response))
        history = prompt + response
    got = rows_of(*calls)
    assert not got.dropped
    assert sum(int(row.trained.sum()) for row in got.rows) == sum(len(response) for _, response, _ in turns)
    by_id = {one.span_id: s.model_call(one) for one in calls}
    assert sorted(i for row in got.rows for i in row.span_ids) == sorted(by_id)
    for row in got.rows:
        sampled = np.concatenate([by_id[i].response_ids_R for i in row.span_ids])
        logprobs = np.concatenate([by_id[i].logprobs_R for i in row.span_ids])
        assert row.token_ids[row.trained].tolist() == sampled.tolist()
        assert row.logprobs[row.trained].tolist() == logprobs.tolist()
        for i in row.span_ids:  # what the model saw is what the row shows before each response
            length = len(by_id[i].prompt_ids_P)
            assert row.token_ids[:length].tolist() == by_id[i].prompt_ids_P.tolist()
