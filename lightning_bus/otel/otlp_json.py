"""OTLP in JSON, read into the same spans as `otlp` reads protobuf. Pure.

As the format has it: ids in hex, bytes in base64, 64-bit numbers as text. Senders that write such numbers as numbers,
or enums by name, are understood too.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, cast

import msgspec

from lightning_bus.otel.otlp import DEPTH_MAX, STATUS_ERROR, Attributes, BadExport, OtlpSpan, Scope, kind_name

Json = dict[str, Any]


def decode_json(body: bytes) -> list[Scope]:
    """Return the spans of an ExportTraceServiceRequest in JSON. Raises BadExport."""
    try:
        export = _dict(msgspec.json.decode(body), "the export")
        return [scope for item in _list(export, "resourceSpans") for scope in _resource_spans(item)]
    except BadExport:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, TypeError, OverflowError) as exc:
        raise BadExport(f"{len(body)} bytes are not an ExportTraceServiceRequest in JSON: {exc}") from exc


def _resource_spans(item: Json) -> list[Scope]:
    resource = _attributes(_dict(item.get("resource"), "resource"))
    return [
        Scope(
            resource, str(_dict(scope.get("scope"), "scope").get("name", "")), [_span(x) for x in _list(scope, "spans")]
        )
        for scope in _list(item, "scopeSpans")
    ]


def _span(item: Json) -> OtlpSpan:
    status = _dict(item.get("status"), "status")
    return OtlpSpan(
        trace_id=_id(item, "traceId"),
        span_id=_id(item, "spanId"),
        parent_id=_id(item, "parentSpanId"),
        name=str(item.get("name", "")),
        kind=kind_name(_enum(item.get("kind", 0), "SPAN_KIND_", _KINDS)),
        start_ns=_time(item, "startTimeUnixNano"),
        end_ns=_time(item, "endTimeUnixNano"),
        attributes=_attributes(item),
        events=[
            (str(event.get("name", "")), _time(event, "timeUnixNano"), _attributes(event))
            for event in _list(item, "events")
        ],
        links=[(_id(link, "traceId"), _id(link, "spanId"), _attributes(link)) for link in _list(item, "links")],
        failed=_enum(status.get("code", 0), "STATUS_CODE_", _STATUS) == STATUS_ERROR,
        message=str(status.get("message", "")),
    )


_KINDS = {"UNSPECIFIED": 0, "INTERNAL": 1, "SERVER": 2, "CLIENT": 3, "PRODUCER": 4, "CONSUMER": 5}
_STATUS = {"UNSET": 0, "OK": 1, "ERROR": 2}


def _attributes(item: Json) -> Attributes:
    return _pairs(item, "attributes", DEPTH_MAX)


def _pairs(item: Json, name: str, depth: int) -> Attributes:
    return {str(pair.get("key", "")): _value(pair.get("value"), depth) for pair in _list(item, name)}


def _value(given: Any, depth: int) -> Any:
    if depth == 0:
        raise BadExport(f"a value holds values more than {DEPTH_MAX} deep")
    for name, inner in _dict(given, "a value").items():
        if name in _SCALARS:
            return _SCALARS[name](inner)
        if name == "arrayValue":
            return [_value(item, depth - 1) for item in _list(_dict(inner, name), "values")]
        if name == "kvlistValue":
            return _pairs(_dict(inner, name), "values", depth - 1)
    return None


def _int(value: Any) -> int:
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise BadExport(f"intValue {value!r:.40} has more than 64 bits")
    return number


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise BadExport(f"bytesValue is not base64: {exc}") from exc


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "stringValue": str,
    "boolValue": bool,
    "intValue": _int,
    "doubleValue": float,  # as text where JSON has no such number: NaN, Infinity
    "bytesValue": _bytes,
}


def _id(item: Json, name: str) -> bytes:
    return bytes.fromhex(item.get(name) or "")


def _time(item: Json, name: str) -> int:
    nanoseconds = int(item.get(name) or 0)
    if not 0 <= nanoseconds < 1 << 64:
        raise BadExport(f"{name} {nanoseconds} is no time")
    return nanoseconds


def _enum(value: Any, prefix: str, by_name: dict[str, int]) -> int:
    if isinstance(value, str) and not value.isdecimal():
        return by_name.get(value.removeprefix(prefix), 0)
    return int(value)


def _dict(value: Any, what: str) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadExport(f"{what} is {value!r:.60}, not an object")
    return cast("Json", value)


def _list(item: Json, name: str) -> list[Json]:
    values = item.get(name)
    if values is None:
        return []
    if not isinstance(values, list):
        raise BadExport(f"{name} is {values!r:.60}, not a list")
    return [_dict(value, f"one of {name}") for value in cast("list[Any]", values)]
