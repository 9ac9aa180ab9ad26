"""Recording alone: answers in, spans out, whatever the engine gave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_bus import spans as s
from lightning_bus.gateway.dialects import as_asked
from lightning_bus.gateway.recording import (
    Call,
    StreamRecord,
    failed_span,
    model_call_spans,
    prepare,
    skewing_parameters,
)
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.spans import model_call
from lightning_bus.tokens import Claims

CALL = Call("r-1", 1, b"t" * 16, b"p" * 8, {"model": "policy", "temperature": 1.0, "top_p": 1.0}, b"{}", start_ns=10)
ANSWER: dict[str, Any] = {
    "prompt_token_ids": [1, 2],
    "choices": [
        {
            "message": {"content": "x"},
            "finish_reason": "stop",
            "token_ids": [3],
            "logprobs": {"content": [{"logprob": -0.5}]},
            "weight_versions": [{"version": "7", "start": 0, "end": 1}],
        }
    ],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1},
}


def untrainable(**changes: Any) -> str:
    """Why a call is untrainable when the engine's choice differs like this from a good one."""
    answer = {**ANSWER, "choices": [{**ANSWER["choices"][0], **changes}]}
    [span] = model_call_spans(CALL, answer, 20, lambda: b"i" * 8)
    assert s.decode_spans(s.encode_spans([span])) == [span]
    return model_call(span).untrainable


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"token_ids": []}, "token ids missing"),
        ({"token_ids": None}, "token ids missing"),
        ({"token_ids": "3"}, "0 tokens"),
        ({"token_ids": ["3x"]}, "malformed"),
        ({"token_ids": [-1]}, "malformed"),
        ({"token_ids": [3, 4]}, "1 log-probs for 2 tokens"),
        ({"logprobs": {}}, "log-probs missing"),
        ({"logprobs": {"content": [{}]}}, "log-probs not finite"),
        ({"logprobs": {"content": [{"logprob": "low"}]}}, "malformed"),
    ],
)
def test_what_cannot_be_trusted_is_never_trained_on(changes: dict[str, Any], reason: str) -> None:
    assert reason in untrainable(**changes) and bool(reason) == bool(untrainable(**changes))


@pytest.mark.parametrize("answer", [{}, {"choices": None}, {"choices": []}, {"choices": [3]}])
def test_an_answer_without_choices_is_a_failed_call(answer: dict[str, Any]) -> None:
    [span] = model_call_spans(CALL, answer, 20, lambda: b"i" * 8)
    assert (span.attributes[s.UNTRAINABLE], span.error) == ("no answer", "no choices in the answer")


def test_a_failed_call_keeps_what_was_asked() -> None:
    span = failed_span(CALL, "engine answered 500", 20, b"i" * 8)
    assert (span.error, span.attributes[s.REQUEST_BODY], span.start_ns, span.end_ns) == (
        "engine answered 500",
        "{}",
        10,
        20,
    )
    assert s.is_model_call(span)


def test_a_request_is_prepared_without_touching_the_agents_own() -> None:
    asked = {"model": "a", "temperature": None, "stream": True, "stream_options": {"x": 1}, "cache_salt": "mine"}
    before = json.dumps(asked)
    sent = prepare(asked, Claims("r", 1, model="b", overrides={"top_p": 0.9, "stream": False}))
    assert json.dumps(asked) == before
    assert sent == {
        "model": "b", "temperature": 1.0, "top_p": 0.9, "stream": True, "stream_options": {"x": 1, "include_usage": True},
        "logprobs": True, "return_token_ids": True, "cache_salt": "mine",
    }  # fmt: skip


def test_neutral_parameters_do_not_skew() -> None:
    assert (
        skewing_parameters({"top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0, "logit_bias": None}) == []
    )
    assert skewing_parameters({"top_p": 0.9, "top_k": 20, "temperature": 0.5}) == ["top_p", "top_k"]


def test_streamed_tool_calls_are_put_together_again() -> None:
    record = StreamRecord()
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}, {"index": 1, "function": {"name": "sub"}}]},
    ]
    for delta in deltas:
        record.add({"choices": [{"index": 0, "delta": delta}]})
    assert not record.finished
    record.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    assert record.finished
    assert record.response()["choices"][0]["message"] == {
        "role": "assistant",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            {"function": {"name": "sub", "arguments": ""}},
        ],
    }


def test_a_stream_records_the_same_as_the_answer_in_one_piece() -> None:
    record = StreamRecord()
    choice = ANSWER["choices"][0]
    record.add({"prompt_token_ids": [1, 2], "choices": [{"index": 0, "delta": {"content": ""}}]})
    part = {"token_ids": [3], "logprobs": choice["logprobs"], "finish_reason": None}
    record.add({"choices": [{"index": 0, "delta": {"content": "x"}, **part}]})
    end = {"finish_reason": "stop", "weight_versions": choice["weight_versions"]}
    record.add({"choices": [{"index": 0, "delta": {}, **end}]})
    record.add({"choices": [], "usage": ANSWER["usage"]})
    assert model_call_spans(CALL, record.response(), 20, lambda: b"i" * 8) == model_call_spans(
        CALL, ANSWER, 20, lambda: b"i" * 8
    )


def test_only_what_the_gateway_asked_for_is_taken_out() -> None:
    answer = json.loads(json.dumps(ANSWER))
    assert as_asked(answer, {}) == {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprobs": None}],
        "usage": ANSWER["usage"],
    }
    assert as_asked(json.loads(json.dumps(ANSWER)), {"logprobs": True, "return_token_ids": True}) == ANSWER


def test_every_attempt_has_a_trace_of_its_own() -> None:
    names = [("r-1", 1), ("r-1", 2), ("r-2", 1), ("r-1/1", 1)]
    assert len({root_of_attempt(*name) for name in names}) == len(names)
    assert [len(part) for part in root_of_attempt("r-1", 1)] == [16, 8]
    assert root_of_attempt("r-1", 1) == root_of_attempt("r-1", 1)


@pytest.mark.parametrize(
    ("name", "neutral", "skewing"),
    [
        ("top_p", 1, 0.9), ("top_k", -1, 20), ("min_p", 0.0, 0.1), ("logit_bias", {}, {"3": -1}),
        ("presence_penalty", 0, 0.5), ("frequency_penalty", 0, 0.5), ("repetition_penalty", 1, 1.1),
        ("min_tokens", 0, 5), ("bad_words", [], ["no"]), ("allowed_token_ids", None, [3]),
        ("structured_outputs", None, {"choice": ["yes", "no"]}),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("tool_choice", "auto", "required"), ("tool_choice", "none", {"type": "function", "function": {"name": "f"}}),
    ],
)  # fmt: skip
def test_what_samples_from_another_distribution_than_the_trainers_is_named(
    name: str, neutral: object, skewing: object
) -> None:
    """Each of them takes mass from some tokens for others, which the trainer's log-probs know nothing of."""
    assert skewing_parameters({name: neutral, "temperature": 0.5}) == []
    assert skewing_parameters({name: skewing, "temperature": 0.5}) == [name]
