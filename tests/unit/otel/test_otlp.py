"""OTLP by hand, against OpenTelemetry's own messages, and against any bytes."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from lightning_bus.otel import otlp
from lightning_bus.otel.otlp import BadExport, Scope, decode_protobuf
from lightning_bus.otel.otlp_json import decode_json

INTS = st.integers(-(2**63), 2**63 - 1)
TIMES = st.integers(0, 2**64 - 1)
VALUES = st.recursive(
    st.one_of(st.text(), st.booleans(), INTS, st.floats(allow_nan=False), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
ATTRIBUTES = st.dictionaries(st.text(), VALUES, max_size=4)
SPANS = st.builds(
    otlp.OtlpSpan,
    trace_id=st.binary(min_size=16, max_size=16), span_id=st.binary(min_size=8, max_size=8),
    parent_id=st.one_of(st.just(b""), st.binary(min_size=8, max_size=8)), name=st.text(),
    kind=st.sampled_from(["", "server", "client", "producer", "consumer"]), start_ns=TIMES, end_ns=TIMES,
    attributes=ATTRIBUTES, events=st.lists(st.tuples(st.text(), TIMES, ATTRIBUTES), max_size=2),
    links=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8), ATTRIBUTES), max_size=2),
    failed=st.booleans(), message=st.text(),
)  # fmt: skip
EXPORTS = st.lists(st.builds(Scope, resource=ATTRIBUTES, name=st.text(), spans=st.lists(SPANS, max_size=3)), max_size=3)


@given(EXPORTS)
def test_protobuf_is_read_as_opentelemetry_writes_it(scopes: list[Scope]) -> None:
    assert decode_protobuf(_proto(scopes).SerializeToString()) == scopes


@given(EXPORTS)
def test_json_is_read_as_the_format_has_it(scopes: list[Scope]) -> None:
    written = json_format.MessageToDict(_proto(scopes), use_integers_for_enums=True)
    assert decode_json(json.dumps(_hex_ids(written)).encode()) == scopes


@given(st.binary())
def test_any_bytes_are_an_export_or_a_reason(body: bytes) -> None:
    for decode in (decode_protobuf, decode_json):
        try:
            decode(body)
        except BadExport as exc:
            assert str(exc)


@given(EXPORTS, st.data())
def test_damaged_protobuf_is_an_export_or_a_reason(scopes: list[Scope], data: st.DataObject) -> None:
    body = bytearray(_proto(scopes).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_protobuf(bytes(body))
    except BadExport as exc:
        assert str(exc)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["resourceSpans", "resource", "attributes", "scopeSpans", "spans", "key", "value", "kind", "status",
                 "code", "startTimeUnixNano", "traceId", "arrayValue", "values", "intValue", "bytesValue", "events"]
            ),
            inner, max_size=4,
        ),
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_any_json_is_an_export_or_a_reason(value: Any) -> None:
    try:
        decode_json(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [value]}], "resource": value}]}).encode())
    except BadExport as exc:
        assert str(exc)


def test_numbers_and_names_that_senders_get_wrong_are_understood() -> None:
    span = {"traceId": "0a" * 16, "spanId": "0b" * 8, "kind": "SPAN_KIND_CLIENT", "startTimeUnixNano": 5, "endTimeUnixNano": "7",
            "status": {"code": "STATUS_CODE_ERROR"}, "attributes": [{"key": "n", "value": {"doubleValue": "NaN"}}]}  # fmt: skip
    ((found,),) = [
        scope.spans
        for scope in decode_json(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode())
    ]
    assert (found.kind, found.start_ns, found.end_ns, found.failed) == ("client", 5, 7, True)
    assert math.isnan(found.attributes["n"])


def test_values_nested_without_end_are_refused() -> None:
    value = AnyValue(string_value="deep")
    for _ in range(40):
        value = AnyValue(array_value=ArrayValue(values=[value]))
    request = service.ExportTraceServiceRequest()
    request.resource_spans.add().scope_spans.add().spans.add().attributes.add(key="k", value=value)
    with pytest.raises(BadExport, match="more than 32 deep"):
        decode_protobuf(request.SerializeToString())
    with pytest.raises(BadExport):
        decode_json(b'{"resourceSpans":' + b"[" * 5000 + b"]" * 5000 + b"}")


@pytest.mark.parametrize(("rejected", "message"), [(0, ""), (1, "no"), (300, "x" * 200), (0, "a warning")])
def test_answers_are_what_opentelemetry_reads(rejected: int, message: str) -> None:
    answer = service.ExportTraceServiceResponse.FromString(otlp.encode_response(rejected, message, as_json=False))
    assert (answer.partial_success.rejected_spans, answer.partial_success.error_message) == (rejected, message)
    answer = json_format.Parse(
        otlp.encode_response(rejected, message, as_json=True), service.ExportTraceServiceResponse()
    )
    assert (answer.partial_success.rejected_spans, answer.partial_success.error_message) == (rejected, message)


def _proto(scopes: list[Scope]) -> Any:
    request = service.ExportTraceServiceRequest()
    for scope in scopes:
        resource_spans = request.resource_spans.add()
        resource_spans.resource.attributes.extend(_pairs(scope.resource))
        scope_spans = resource_spans.scope_spans.add()
        scope_spans.scope.name = scope.name
        scope_spans.spans.extend(_proto_span(span) for span in scope.spans)
    return request


def _proto_span(span: otlp.OtlpSpan) -> ProtoSpan:
    made = ProtoSpan(
        trace_id=span.trace_id, span_id=span.span_id, parent_span_id=span.parent_id, name=span.name,
        kind=1 if not span.kind else otlp.KINDS.index(span.kind), start_time_unix_nano=span.start_ns,  # type: ignore[arg-type]
        end_time_unix_nano=span.end_ns, attributes=_pairs(span.attributes),
        events=[ProtoSpan.Event(name=name, time_unix_nano=at, attributes=_pairs(more)) for name, at, more in span.events],
        links=[ProtoSpan.Link(trace_id=a, span_id=b, attributes=_pairs(more)) for a, b, more in span.links],
    )  # fmt: skip
    made.status.code = 2 if span.failed else 1  # type: ignore[assignment]
    made.status.message = span.message
    return made


def _pairs(attributes: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_value(value)) for key, value in attributes.items()]


def _value(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, str):
        return AnyValue(string_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, bytes):
        return AnyValue(bytes_value=value)
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[_value(item) for item in value]))
    return AnyValue(kvlist_value=KeyValueList(values=_pairs(value)))


def _hex_ids(value: Any) -> Any:
    """Protobuf's JSON has ids in base64 where OTLP's has hex."""
    if isinstance(value, list):
        return [_hex_ids(item) for item in value]
    if isinstance(value, dict):
        return {
            name: base64.b64decode(inner).hex() if name in ("traceId", "spanId", "parentSpanId") and isinstance(inner, str) else _hex_ids(inner)
            for name, inner in value.items()
        }  # fmt: skip
    return value
