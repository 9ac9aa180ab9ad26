"""Spans of one attempt → its transitions, and the rows to train on."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import spans as s
from lightning_bus.adapters import Reward, Row, Selection
from lightning_bus.adapters.transitions import Transitions, transitions_of
from tests.bus_fixtures import span
from tests.reference import transitions as reference


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


def rows_of(*calls: s.Span, **how: Any) -> Transitions:
    return transitions_of("r-1", 1, "g", calls, **how)


def by(agent: str, one: s.Span) -> s.Span:
    return msgspec.structs.replace(one, attributes={**one.attributes, s.AGENT_NAME: agent})


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


def test_a_row_that_holds_a_call_of_unknown_weights_is_of_unknown_age() -> None:
    (row,) = rows_of(call([1], [2], version="9"), call([1, 2, 3], [4], **{s.WEIGHT_VERSIONS: []})).rows
    assert (row.version_oldest, row.version_newest) == (-1, 9)


# -- (state, action, reward, next state)


def test_a_transition_is_a_call_with_the_prompt_that_came_after_it() -> None:
    first, second, other = call([1], [2, 3]), call([1, 2, 3, 9], [4]), call([7], [8])
    got = rows_of(first, second, other)
    assert [turn.state_P.tolist() for turn in got.turns] == [[1], [1, 2, 3, 9], [7]]
    assert [turn.action_R.tolist() for turn in got.turns] == [[2, 3], [4], [8]]
    followed = [None if turn.next_state_P is None else turn.next_state_P.tolist() for turn in got.turns]
    assert followed == [[1, 2, 3, 9], None, None]
    assert [[turn.span_id for turn in members] for members in got.members] == [list(row.span_ids) for row in got.rows]


def test_rewards_lie_on_the_calls_that_earned_them_and_none_is_lost() -> None:
    writer, checker, again, retry = (
        by("w", call([1], [2])),
        by("c", call([5], [6])),
        call([7], [8]),
        call([7], [9], retry=1),
    )
    again, retry = by("w", again), by("w", retry)
    rewards = {
        one.span_id: [Reward(one.span_id, 2.0**k, "test")] for k, one in enumerate((writer, checker, again, retry))
    }
    got = rows_of(writer, checker, again, retry, rewards=rewards, selection=Selection.of(["w"]))
    # The checker's is the writer's before it; that of the superseded call goes where nothing is lost.
    assert [turn.reward for turn in got.turns] == [1.0 + 2.0 + 4.0, 8.0]
    assert [reward.source for turn in got.turns for reward in turn.rewards] == ["test"] * 4


def test_a_call_that_cannot_be_trained_is_a_turn_all_the_same() -> None:
    broken, whole = call([1], []), call([1], [2])
    got = rows_of(broken, whole, rewards={broken.span_id: [Reward(broken.span_id, -1.0, "tool_error")]})
    assert [(turn.left_out, turn.reward) for turn in got.turns] == [("token ids missing", -1.0), ("", 0.0)]


# -- forks


def test_two_branches_of_one_turn_train_it_once() -> None:
    """The second branch's prompt holds the shared tokens as context."""
    trunk, left, right = call([1], [2, 3]), call([1, 2, 3, 4], [5]), call([1, 2, 3, 6], [7])
    got = rows_of(trunk, left, right)
    assert [row.token_ids.tolist() for row in got.rows] == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]]
    assert [row.trained.tolist() for row in got.rows] == [
        [False, True, True, False, True], [False, False, False, False, True],
    ]  # fmt: skip
    assert got.turns[0].next_state_P is not None and got.turns[0].next_state_P.tolist() == [1, 2, 3, 4]


def test_merging_is_counted() -> None:
    got = rows_of(call([1], [2, 3]), call([1, 2, 3, 4], [5]), call([1, 2, 3, 6], [7]), call([1], []))
    assert (got.merged.rollouts, got.merged.calls, got.merged.rows) == (1, 3, 2)
    assert (got.merged.call_tokens, got.merged.tokens, got.merged.tokens_saved) == (13, 10, 3)
    both = got.merged + rows_of(call([1], [2])).merged
    assert (both.rows_per_rollout, both.merge_ratio) == (1.5, 15 / 12)


def test_calls_of_different_policies_do_not_merge() -> None:
    one = by("a", call([1], [2], **{s.REQUEST_MODEL: "p"}))
    two = by("b", call([1, 2, 3], [4], **{s.REQUEST_MODEL: "q"}))
    got = rows_of(one, two, selection=Selection.of({"a": "p", "b": "q"}))
    assert [(row.policy, row.token_ids.tolist()) for row in got.rows] == [("p", [1, 2]), ("q", [1, 2, 3, 4])]
    only = rows_of(one, two, selection=Selection.of({"a": "p", "b": "q"}), policy="q")
    assert [row.policy for row in only.rows] == ["q"]
    assert only.dropped == {"other policy": 1}
    foreign = by("a", call([1], [2], **{s.REQUEST_MODEL: "gpt-x"}))
    assert rows_of(foreign, selection=Selection.of({"a": "p"})).dropped == {
        "answered by another model than the policy": 1
    }
    assert len(rows_of(foreign, selection=Selection.of({"a": "p"}), any_model=True).rows) == 1


# -- what is left out, and why


def test_a_span_that_is_there_twice_is_trained_once() -> None:
    one = call([1], [2])
    got = rows_of(one, one)
    assert len(got.rows) == 1
    assert (got.calls, got.dropped) == (2, {"span recorded twice": 1})


def test_spans_of_another_attempt_or_rollout_are_counted_and_not_trained() -> None:
    mine = call([1], [2])
    other = msgspec.structs.replace(call([3], [4]), attempt=2)
    foreign = msgspec.structs.replace(call([5], [6]), rollout_id="r-2")
    got = rows_of(mine, other, foreign)
    assert [row.span_ids for row in got.rows] == [(mine.span_id,)]
    assert got.dropped == {"of another attempt": 2}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({s.LOGPROBS: s.pack_logprobs([-1.0])}, "log-probs of another length"),
        ({s.LOGPROBS: s.pack_logprobs([-1.0, float("nan")])}, "log-probs not finite"),
        ({s.RESPONSE_IDS: [2, 3]}, f"malformed: {s.RESPONSE_IDS}"),
        ({s.WEIGHT_VERSIONS: 7}, f"malformed: {s.WEIGHT_VERSIONS}"),
        ({s.UNTRAINABLE: "x" * 500}, "x" * 80),
    ],
)
def test_what_cannot_be_trained_has_a_reason_without_particulars(change: dict[str, Any], reason: str) -> None:
    got = rows_of(call([1], [2, 3], **change))
    assert (got.rows, dict(got.dropped)) == ([], {reason: 1})


@pytest.mark.parametrize("garbage", ["twice", None, [1], -3])
def test_garbage_where_a_number_should_be_is_no_retry_and_no_crash(garbage: Any) -> None:
    got = rows_of(
        call([1], [2]), call([1], [3], **{s.RETRY_COUNT: garbage, s.CHOICE: garbage, s.FINISH_REASONS: garbage})
    )
    assert (len(got.rows), dict(got.dropped)) == (2, {})


def test_answers_that_were_cut_off_are_trained_or_masked_or_take_the_rollout_with_them() -> None:
    cut = call([1], [2], **{s.FINISH_REASONS: ["length"]})
    after, aside = call([1, 2, 3], [4]), call([9], [9])
    assert [turn.truncated for turn in rows_of(cut, after).turns] == [True, False]
    assert [row.trained.sum() for row in rows_of(cut, after, aside).rows] == [2, 1]
    masked = rows_of(cut, after, aside, truncated="mask")
    assert [(row.token_ids.tolist(), row.trained.tolist()) for row in masked.rows] == [
        ([1, 2, 3, 4], [False, False, False, True]), ([9, 9], [False, True]),
    ]  # fmt: skip
    assert masked.dropped == {"truncated": 1}
    dropped = rows_of(cut, after, aside, truncated="drop")
    assert (dropped.rows, dict(dropped.dropped)) == ([], {"truncated": 1, "in a truncated rollout": 2})


def test_a_turn_that_is_too_long_leaves_those_before_it() -> None:
    got = rows_of(call([1], [2]), call([1, 2, 3], [4]), call([1, 2, 3, 4, 5], [6]), tokens_max=4)
    assert [row.token_ids.tolist() for row in got.rows] == [[1, 2, 3, 4]]
    assert got.dropped == {"over length": 1}


# -- advantages


def test_every_sampled_token_carries_the_advantage_of_its_call() -> None:
    first, second = call([1], [2, 3]), call([1, 2, 3], [4])  # nothing between them, so the mask alone could not tell
    (row,) = rows_of(first, second).rows
    stamped = row.with_advantages({first.span_id: 0.5, second.span_id: -2.0})
    assert stamped.advantages is not None and stamped.advantages.tolist() == [0, 0.5, 0.5, -2.0]
    assert row.advantages is None
    with pytest.raises(ValueError, match="was given no advantage"):
        row.with_advantages({first.span_id: 0.5})


def test_a_row_that_does_not_say_whose_tokens_are_whose_is_refused_advantages_by_call() -> None:
    ones = np.ones(1, np.int32)
    row = Row("r", 1, "g", ones, ones > 0, ones.astype(np.float32), ones.astype(np.float32), 0, 0, (b"12345678",))
    with pytest.raises(ValueError, match="only rows made from spans"):
        row.with_advantages({b"12345678": 1.0})


# -- any spans


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


@st.composite
def logs(draw: st.DrawFn) -> list[s.Span]:
    """Calls in order of time that continue any earlier one, or begin anew, or repeat one: parallel agents, retries, gaps."""
    made: list[s.Span] = []
    histories: list[list[int]] = [[]]
    for _ in range(draw(st.integers(1, 10))):
        prompt = draw(st.sampled_from(histories)) + draw(tokens if draw(st.booleans()) else st.just([1]))
        response = draw(tokens)
        one = by(draw(st.sampled_from(["a", "b"])), call(prompt, response, retry=draw(st.sampled_from([0, 0, 0, 1]))))
        broken = draw(st.sampled_from([{}, {}, {}, {s.LOGPROBS: b""}, {s.UNTRAINABLE: "cut off"}]))
        made.append(msgspec.structs.replace(one, attributes={**one.attributes, **broken}))
        histories.append(prompt + response)
    return made


@given(logs(), st.sampled_from([(), ("a",), ("a", "b")]), st.integers(2, 20))
def test_every_call_is_trained_once_or_counted_once(
    spans: list[s.Span], agents: tuple[str, ...], tokens_max: int
) -> None:
    got = rows_of(*spans, selection=Selection.of(agents), tokens_max=tokens_max)
    trained = [span_id for row in got.rows for span_id in row.span_ids]
    assert len(trained) == len(set(trained))
    assert len(trained) + sum(got.dropped.values()) == got.calls == len(spans)
    assert sorted(trained) == sorted(turn.span_id for turn in got.turns if not turn.left_out)
    by_id = {one.span_id: s.model_call(one) for one in spans}
    for row in got.rows:
        calls = [by_id[span_id] for span_id in row.span_ids]
        assert int(row.trained.sum()) == sum(len(one.response_ids_R) for one in calls)
        for one, (start, end) in zip(calls, row.sampled, strict=True):
            assert row.token_ids[start:end].tolist() == one.response_ids_R.tolist()
            assert row.logprobs[start:end].tolist() == one.logprobs_R.tolist()
            assert row.token_ids[:start].tolist() == one.prompt_ids_P.tolist()
        assert len(row.token_ids) <= tokens_max


@given(logs())
def test_rows_are_those_of_the_slow_twin(spans: list[s.Span]) -> None:
    got = rows_of(*spans)
    calls = [turn.call for turn in got.turns if not turn.left_out]
    expected = [tuple(one.span_id for one in row) for row in reference.merged(calls)]
    assert [row.span_ids for row in got.rows] == expected
    assert got.merged.rows == len(got.rows)
    assert got.merged.tokens == sum(len(row.token_ids) for row in got.rows)


@given(logs(), st.randoms(use_true_random=False))
def test_the_order_in_which_spans_came_does_not_matter(spans: list[s.Span], random: Any) -> None:
    shuffled = [*spans, spans[0]]
    random.shuffle(shuffled)
    ours, theirs = rows_of(*spans), rows_of(*shuffled)
    assert [row.span_ids for row in ours.rows] == [row.span_ids for row in theirs.rows]
    assert [turn.span_id for turn in ours.turns] == [turn.span_id for turn in theirs.turns]
    assert theirs.dropped == ours.dropped + type(ours.dropped)({"span recorded twice": 1})


@given(logs(), st.lists(st.integers(-3, 3), min_size=10, max_size=10))
def test_what_calls_earned_is_what_turns_earned(spans: list[s.Span], values: list[int]) -> None:
    rewards = {one.span_id: [Reward(one.span_id, float(v), "x")] for one, v in zip(spans, values, strict=False)}
    got = rows_of(*spans, rewards=rewards, selection=Selection.of(["a"]))
    expected = sum(each[0].value for each in rewards.values()) if got.turns else 0
    assert sum(turn.reward for turn in got.turns) == expected
