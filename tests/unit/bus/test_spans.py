"""Spans, and the typed view of a model call."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest

from lightning_bus import spans as s
from lightning_bus.errors import RemoteProtocolError
from tests.bus_fixtures import span


def call(**changed: Any) -> s.ModelCall:
    attributes: dict[str, Any] = {
        s.OPERATION: s.MODEL_CALL_NAME,
        s.PROMPT_IDS: s.pack_ids([1, 2, 3]),
        s.RESPONSE_IDS: s.pack_ids([4, 5]),
        s.LOGPROBS: s.pack_logprobs([-0.5, -1.5]),
        s.WEIGHT_VERSIONS: [["7", 0, 2]],
        s.TEMPERATURE: 0.7,
    }
    attributes |= {getattr(s, name): value for name, value in changed.items()}
    return s.model_call(span("chat", "r-1", 1, **attributes))


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
    assert s.is_model_call(call().span)
    assert not s.is_model_call(span("chat"))


def test_a_reward_is_a_number_or_nothing() -> None:
    assert s.reward_of(span(**{s.REWARD: 1})) == 1.0
    assert s.reward_of(span()) is None
