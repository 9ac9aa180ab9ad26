"""OTLP: what an OpenTelemetry SDK or a collector sends to /v1/traces, in protobuf; `otlp_json` reads it in JSON. Pure.

The few messages of it that carry spans are read here by hand, so a gateway takes traces without protobuf or any
OpenTelemetry package being installed. Fields that we do not know are passed over, as both formats ask. Any bytes are
either an export or a BadExport that says what is wrong with them.

    resource_spans ─► scope_spans ─► span ─► attributes, events, links, status
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

DEPTH_MAX = 32  # of values within values
KINDS = ("", "", "server", "client", "producer", "consumer")  # by number; internal needs no saying
STATUS_ERROR = 2

Attributes = dict[str, Any]


class BadExport(ValueError):
    """These bytes are not an ExportTraceServiceRequest."""


class OtlpSpan(msgspec.Struct):
    """A span as it came."""

    trace_id: bytes = b""
    span_id: bytes = b""
    parent_id: bytes = b""
    name: str = ""
    kind: str = ""  # server, client, producer, consumer, or empty
    start_ns: int = 0
    end_ns: int = 0
    attributes: Attributes = {}
    events: list[tuple[str, int, Attributes]] = []
    links: list[tuple[bytes, bytes, Attributes]] = []
    failed: bool = False
    message: str = ""  # of its status


class Scope(msgspec.Struct):
    """Spans of one instrumentation of one resource."""

    resource: Attributes
    name: str
    spans: list[OtlpSpan]


def decode_protobuf(body: bytes) -> list[Scope]:
    """Return the spans of an ExportTraceServiceRequest. Raises BadExport."""
    try:
        return [scope for number, value in _fields(body) if number == 1 for scope in _resource_spans(_raw(value))]
    except (struct.error, UnicodeDecodeError, IndexError) as exc:
        raise BadExport(f"{len(body)} bytes are not an ExportTraceServiceRequest: {exc}") from exc


def encode_response(rejected: int, message: str, *, as_json: bool) -> bytes:
    """Return an ExportTraceServiceResponse: a partial success where spans were rejected, else an empty one."""
    if not rejected and not message:
        return b"{}" if as_json else b""
    if as_json:
        return msgspec.json.encode({"partialSuccess": {"rejectedSpans": str(rejected), "errorMessage": message}})
    text = message.encode()
    partial = (b"\x08" + _varint(rejected) if rejected else b"") + b"\x12" + _varint(len(text)) + text
    return b"\x0a" + _varint(len(partial)) + partial


def encode_status(message: str, *, as_json: bool) -> bytes:
    """Return the google.rpc.Status that says why a whole request was refused."""
    if as_json:
        return msgspec.json.encode({"message": message})
    text = message.encode()
    return b"\x12" + _varint(len(text)) + text


# -- protobuf ---------------------------------------------------------------------------------------------------------


def _fields(data: memoryview | bytes) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of a message: an int for varint and fixed fields, bytes for the rest."""
    view = memoryview(data)
    at, end = 0, len(view)
    while at < end:
        tag, at = _read_varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _read_varint(view, at)
            yield number, value
        elif kind == 2:
            size, at = _read_varint(view, at)
            if size > end - at:
                raise BadExport(f"field {number} wants {size} bytes where {end - at} are left")
            yield number, view[at : at + size]
            at += size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield number, int.from_bytes(_exactly(view[at : at + size], size), "little")
            at += size
        else:
            raise BadExport(f"field {number} has wire type {kind}, which protobuf no longer has")


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    byte = view[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = view[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + 1
        shift += 7
        if shift > 63:
            raise BadExport("a varint has more than 10 bytes")


def _resource_spans(data: memoryview) -> Iterator[Scope]:
    resource: Attributes = {}
    scopes: list[memoryview] = []
    for number, value in _fields(data):
        if number == 1:
            resource = _attributes(_raw(value), 1)
        elif number == 2:
            scopes.append(_raw(value))
    for scope in scopes:
        name, spans = "", list[OtlpSpan]()
        for number, value in _fields(scope):
            if number == 1:
                name = next((_text(inner) for at, inner in _fields(_raw(value)) if at == 1), "")
            elif number == 2:
                spans.append(_span(_raw(value)))
        yield Scope(resource, name, spans)


def _span(data: memoryview) -> OtlpSpan:
    span = OtlpSpan(attributes={}, events=[], links=[])
    for number, value in _fields(data):
        if number == 9:
            _add_attribute(span.attributes, _raw(value), DEPTH_MAX)
        elif number == 1:
            span.trace_id = bytes(_raw(value))
        elif number == 2:
            span.span_id = bytes(_raw(value))
        elif number == 4:
            span.parent_id = bytes(_raw(value))
        elif number == 5:
            span.name = _text(value)
        elif number == 6:
            span.kind = kind_name(_int(value))
        elif number == 7:
            span.start_ns = _int(value)
        elif number == 8:
            span.end_ns = _int(value)
        elif number == 11:
            span.events.append(_event(_raw(value)))
        elif number == 13:
            span.links.append(_link(_raw(value)))
        elif number == 15:
            for inner, status in _fields(_raw(value)):
                if inner == 2:
                    span.message = _text(status)
                elif inner == 3:
                    span.failed = status == STATUS_ERROR
    return span


def _event(data: memoryview) -> tuple[str, int, Attributes]:
    name, at_ns = "", 0
    for number, value in _fields(data):
        if number == 1:
            at_ns = _int(value)
        elif number == 2:
            name = _text(value)
    return name, at_ns, _attributes(data, 3)


def _link(data: memoryview) -> tuple[bytes, bytes, Attributes]:
    ids = {
        number: bytes(value) for number, value in _fields(data) if number in (1, 2) and isinstance(value, memoryview)
    }
    return ids.get(1, b""), ids.get(2, b""), _attributes(data, 4)


def _attributes(data: memoryview, wanted: int) -> Attributes:
    attributes: Attributes = {}
    for number, value in _fields(data):
        if number == wanted:
            _add_attribute(attributes, _raw(value), DEPTH_MAX)
    return attributes


def _add_attribute(attributes: Attributes, data: memoryview, depth: int) -> None:
    key, found = "", None
    for number, value in _fields(data):
        if number == 1:
            key = _text(value)
        elif number == 2:
            found = _any_value(_raw(value), depth)
    attributes[key] = found


def _any_value(data: memoryview, depth: int) -> Any:
    if depth == 0:
        raise BadExport(f"a value holds values more than {DEPTH_MAX} deep")
    result: Any = None
    for number, value in _fields(data):
        if number == 1:
            result = _text(value)
        elif number == 2:
            result = bool(value)
        elif number == 3:
            unsigned = _int(value)
            result = unsigned - (1 << 64) if unsigned >> 63 else unsigned
        elif number == 4:
            result = struct.unpack("<d", _int(value).to_bytes(8, "little"))[0]
        elif number == 5:
            result = [_any_value(_raw(inner), depth - 1) for at, inner in _fields(_raw(value)) if at == 1]
        elif number == 6:
            result = {}
            for at, inner in _fields(_raw(value)):
                if at == 1:
                    _add_attribute(result, _raw(inner), depth - 1)
        elif number == 7:
            result = bytes(_raw(value))
    return result


def _raw(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise BadExport("a number stands where a message, bytes or text should")
    return value


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise BadExport(f"{len(value)} bytes stand where a number should")
    return value


def _text(value: int | memoryview) -> str:
    return str(_raw(value), "utf-8")


def kind_name(number: int) -> str:
    """Return what a span's kind is called; empty for internal ones and for unknown numbers."""
    return KINDS[number] if 0 <= number < len(KINDS) else ""


def _exactly(data: memoryview, size: int) -> memoryview:
    if len(data) != size:
        raise BadExport(f"a field of {size} bytes has {len(data)}")
    return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
