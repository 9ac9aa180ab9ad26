"""Spans, and the typed view of a model call."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import spans as s
from lightning_bus.errors import RemoteProtocolError
from tests.bus_fixtures import span


def called(**changed: Any) -> s.Span:
    attributes: dict[str, Any] = {
        s.OPERATION: s.MODEL_CALL_NAME,
        s.PROMPT_IDS: s.pack_ids([1, 2, 3]),
        s.RESPONSE_IDS: s.pack_ids([4, 5]),
        s.LOGPROBS: s.pack_logprobs([-0.5, -1.5]),
        s.WEIGHT_VERSIONS: [["7", 0, 2]],
        s.TEMPERATURE: 0.7,
    }
    attributes |= {getattr(s, name): value for name, value in changed.items()}
    return span("chat", "r-1", 1, **attributes)


def call(**changed: Any) -> s.ModelCall:
    return s.model_call(called(**changed))


def test_spans_come_back_whole() -> None:
    spans = [span("a", "r-1", 2, key=b"bytes", other=[1, 2.5, "x", None, True]), span("b")]
    assert s.decode_spans(s.encode_spans(spans)) == spans


def test_another_msgpack_reads_what_we_write() -> None:
    one = span("a", "r-1", 2, ids=s.pack_ids([1, 70_000]))
    (fields,) = msgpack.unpackb(s.encode_spans([one]))
    assert fields == [
        one.span_id, one.trace_id, None, "a", one.start_ns, one.end_ns, {"ids": b"\1\0\0\0\x70\x11\1\0"}, "r-1", 2, 0, "",
    ]  # fmt: skip


def test_a_body_that_holds_no_spans_is_refused_by_name() -> None:
    with pytest.raises(RemoteProtocolError, match=r"chunk of 7 bytes.*\$\[0\]"):
        s.decode_spans(msgpack.packb([["x", "y", 1]]))


def test_ids_and_logprobs_are_packed_little_endian() -> None:
    assert s.pack_ids([1, 256]) == b"\1\0\0\0\0\1\0\0"
    assert s.pack_logprobs([-1.0]) == b"\0\0\x80\xbf"


def test_a_model_call_is_typed() -> None:
    got = call()
    assert got.prompt_ids_P.tolist() == [1, 2, 3]
    assert got.response_ids_R.tolist() == [4, 5]
    assert got.logprobs_R.tolist() == [-0.5, -1.5]
    assert got.weight_versions == [("7", 0, 2)]
    assert (got.temperature, got.untrainable) == (0.7, "")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"PROMPT_IDS": b""}, "token ids missing"),
        ({"RESPONSE_IDS": b"", "LOGPROBS": b""}, "token ids missing"),
        ({"LOGPROBS": b""}, "0 log-probs for 2 tokens"),
        ({"LOGPROBS": s.pack_logprobs([-1, -1, -1])}, "3 log-probs for 2 tokens"),
        ({"LOGPROBS": s.pack_logprobs([-1, math.nan])}, "log-probs not finite"),
        ({"LOGPROBS": s.pack_logprobs([-1, -math.inf])}, "log-probs not finite"),
        ({"UNTRAINABLE": "engine gave no ids"}, "engine gave no ids"),
        ({"PROMPT_IDS": b"12345"}, f"malformed: {s.PROMPT_IDS}"),
        ({"PROMPT_IDS": [1, 2, 3]}, f"malformed: {s.PROMPT_IDS}"),
        ({"LOGPROBS": "-0.5"}, f"malformed: {s.LOGPROBS}"),
        ({"WEIGHT_VERSIONS": 7}, f"malformed: {s.WEIGHT_VERSIONS}"),
        ({"WEIGHT_VERSIONS": [["7", 0]]}, f"malformed: {s.WEIGHT_VERSIONS}"),
        ({"TEMPERATURE": "hot"}, f"malformed: {s.TEMPERATURE}"),
    ],
)
def test_what_cannot_be_trained_on_says_why_and_never_raises(changed: dict[str, Any], why: str) -> None:
    assert call(**changed).untrainable == why


def test_one_log_prob_that_is_not_finite_is_found_anywhere_in_a_long_call() -> None:
    for at in (0, 149, 299):
        logprobs = [-0.5] * 300
        logprobs[at] = math.nan
        got = call(RESPONSE_IDS=s.pack_ids(range(300)), LOGPROBS=s.pack_logprobs(logprobs))
        assert got.untrainable == "log-probs not finite"


def test_log_probs_at_the_end_of_the_range_are_finite() -> None:
    assert call(LOGPROBS=s.pack_logprobs([-3e38, -3e38])).untrainable == ""


def test_arrays_are_views_of_what_was_recorded() -> None:
    assert call().prompt_ids_P.dtype == np.dtype("<i4")
    assert call().logprobs_R.dtype == np.dtype("<f4")


def test_only_chat_spans_are_model_calls() -> None:
    assert s.is_model_call(called())
    assert not s.is_model_call(span("chat"))


def test_a_reward_is_a_number_or_nothing() -> None:
    assert s.reward_of(span(**{s.REWARD: 1})) == 1.0
    assert s.reward_of(span()) is None


# -- the calls of recorded spans


def seen(one: s.ModelCall) -> str:
    """Return everything that a call says; as text, because NaN is not equal to itself."""
    known = one.attributes
    told = msgspec.structs.asdict(one) | msgspec.structs.asdict(known) | {"attributes": None}
    return repr(told | {"prompt": one.prompt_ids, "untrainable": one.untrainable})


NAMES = [
    s.OPERATION, s.REQUEST_MODEL, s.PROMPT_IDS, s.RESPONSE_IDS, s.LOGPROBS, s.WEIGHT_VERSIONS, s.TEMPERATURE,
    s.UNTRAINABLE, s.FINISH_REASONS, s.CHOICE, s.RETRY_COUNT, s.REWARD, "other",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, 1, 2.5, math.inf, 2**63, "", "1", "chat", "why not", b"", b"12345", s.pack_ids([1, 2]),
    s.pack_logprobs([math.nan, -1]), [], ["length"], [["7", 0, 2]], [[7, 0, 2]], [["7", 0.0, True]], [["7", 0, math.inf]],
    [["7", 0]], {"7": 1},
]  # fmt: skip


def agrees_with_each_span_alone(chunks: list[list[dict[str, Any]]]) -> None:
    spans = [[span("chat", "r-1", 1, **attributes) for attributes in chunk] for chunk in chunks]
    recorded = s.RecordedSpans([s.encode_spans(chunk) for chunk in spans])
    alone = [one for chunk in spans for one in s.decode_spans(s.encode_spans(chunk))]
    expected = [s.model_call(one) for one in alone if s.is_model_call(one)]
    assert list(map(seen, s.calls_of(recorded))) == list(map(seen, expected))
    assert s.why_untrainable(recorded.calls) == [one.untrainable for one in expected]
    rewards = [reward for one in s.rewarded_of(recorded) if (reward := s.reward_of(one)) is not None]
    assert rewards == [reward for one in alone if (reward := s.reward_of(one)) is not None]
    assert repr(recorded[:]) == repr(alone) and len(recorded) == len(alone)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_an_attribute_holds_the_calls_of_recorded_spans_are_those_of_each_span_alone(name: str) -> None:
    whole = called().attributes
    for value in VALUES:
        agrees_with_each_span_alone([[whole], [{**whole, name: value}, whole]])
        agrees_with_each_span_alone([[{s.OPERATION: s.MODEL_CALL_NAME, name: value}]])
    agrees_with_each_span_alone([[{key: value for key, value in whole.items() if key != name}]])


@given(st.lists(st.lists(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=4), max_size=3)))
def test_so_they_are_whatever_several_attributes_hold(changes: list[list[dict[str, Any]]]) -> None:
    agrees_with_each_span_alone([[called().attributes | changed for changed in chunk] for chunk in changes])


def test_recorded_spans_that_are_none_are_refused_before_anything_is_learnt_from_them() -> None:
    with pytest.raises(RemoteProtocolError, match="chunk of 1 bytes"):
        s.RecordedSpans([s.encode_spans([span("a")]), b"x"])


def test_what_a_call_carries_besides_is_not_decoded_for_learning_from_it() -> None:
    long = called()
    long.attributes["lightning.request"] = "x" * 10_000
    recorded = s.RecordedSpans([s.encode_spans([long])])
    assert [one.untrainable for one in recorded.calls] == [""] and s.rewarded_of(recorded) == ()
    assert recorded._spans is None  # pyright: ignore[reportPrivateUsage]
    assert recorded == [long]
