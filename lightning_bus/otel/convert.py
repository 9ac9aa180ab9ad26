"""An OpenTelemetry span → the record. Pure, and the one way in for both the SDK in this process and OTLP.

What the record has no field for is kept in its attributes. An exception becomes the attributes that the light tracer
writes, wherever it stood, so readers look in one place.
"""

from __future__ import annotations

from typing import Any

from lightning_bus.otel import names as n
from lightning_bus.otel.attributes import to_record
from lightning_bus.otel.otlp import Attributes, OtlpSpan
from lightning_bus.spans import Span

_EXCEPTION = "exception"  # the event's name
_EXCEPTION_FIELDS = (n.EXCEPTION_TYPE, n.EXCEPTION_MESSAGE, n.EXCEPTION_STACKTRACE)
_WHOSE = frozenset({n.ROLLOUT_ID, n.ATTEMPT, n.SEQUENCE, n.TOKEN})
OUR_SCOPE = "lightning_bus"  # spans of our own tracer do not say so: the light one's are the same


class BadSpan(ValueError):
    """The span cannot be recorded: its ids are not ids."""


def convert(
    span: OtlpSpan, *, rollout_id: str, attempt: int, sequence: int, scope: str = "", resource: Attributes | None = None
) -> Span:
    """Return the record of a span. Its parent and trace are as it says; see BadSpan for what is refused."""
    if len(span.span_id) != 8 or not any(span.span_id) or len(span.trace_id) != 16 or not any(span.trace_id):
        raise BadSpan(
            f"span {span.name!r:.60} has span id {span.span_id.hex()!r:.40} and trace id {span.trace_id.hex()!r:.60}: "
            "8 and 16 bytes that are not all zero are wanted"
        )
    attributes = to_record({name: value for name, value in span.attributes.items() if value is not None})
    for name in _WHOSE & attributes.keys():
        del attributes[name]
    raised = _take_exception(attributes, span)
    error = ""
    if span.failed:
        error = span.message or raised or "failed"
    if span.kind:
        attributes[n.KIND] = span.kind
    if scope and scope != OUR_SCOPE:
        attributes[n.SCOPE] = scope
    if span.links:
        attributes[n.LINKS] = [[trace_id.hex(), span_id.hex(), more] for trace_id, span_id, more in span.links]
    if resource:
        attributes[n.RESOURCE] = resource
    return Span(
        span.span_id, span.trace_id, span.parent_id or None, n.translate(span.name), span.start_ns,
        max(span.start_ns, span.end_ns), attributes, rollout_id, attempt, sequence, error,
    )  # fmt: skip


def resource_facts(resource: Attributes) -> Attributes:
    """Return what of a resource is worth keeping with each of its spans: not whose it is, nor which SDK sent it."""
    return {
        name: value
        for name, value in resource.items()
        if n.translate(name) not in _WHOSE and not name.startswith("telemetry.sdk.") and value is not None
    }


def _take_exception(attributes: dict[str, Any], span: OtlpSpan) -> str:
    """Move the events into attributes; return the exception among them as one line, or nothing."""
    raised, others = "", list[Any]()
    for name, at_ns, fields in span.events:
        if name == _EXCEPTION:
            for field in _EXCEPTION_FIELDS:
                if field in fields:
                    attributes[field] = fields[field]
            raised = f"{fields.get(n.EXCEPTION_TYPE, '')}: {fields.get(n.EXCEPTION_MESSAGE, '')}"
        else:
            others.append([name, at_ns, fields])
    if others:
        attributes[n.EVENTS] = others
    return raised
