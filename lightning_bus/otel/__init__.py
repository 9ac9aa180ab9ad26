"""Tracing: what an agent does besides calling its model, as spans in the same log.

    from lightning_bus.otel import OtelTracer, emit_reward

Agents that a worker runs need no tracer: emitters find their attempt. The files:

tracer, sdk       the light tracer, and the one by OpenTelemetry's SDK
emit, live        rewards, messages, operations; a span while it is open
context, threads  which attempt the code runs in, and how threads and processes know; http: and the gateway
exporter, queue   finished spans on their way, in the background
ingest            OTLP/HTTP at the gateway; otlp, otlp_json, convert, attributes: from wire to record
names             every attribute name
tree, rewards     reading
compat            the quick start of other libraries
"""

from lightning_bus.otel.compat import LightningClient
from lightning_bus.otel.context import Attempt, entered, environment, traceparent
from lightning_bus.otel.emit import (
    Operation,
    emit_annotation,
    emit_exception,
    emit_message,
    emit_object,
    emit_reward,
    operation,
)
from lightning_bus.otel.exporter import SpanExporter
from lightning_bus.otel.http import send_traceparent
from lightning_bus.otel.live import LiveSpan
from lightning_bus.otel.queue import SpanQueue
from lightning_bus.otel.rewards import final_reward, rewards_by_span
from lightning_bus.otel.sdk import OtelTracer
from lightning_bus.otel.threads import carry, carry_into_threads
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.otel.tracer import Tracer
from lightning_bus.otel.tree import tree, tree_facts, tree_lines

__all__ = [
    "Attempt", "LightningClient", "LiveSpan", "Operation", "OtelTracer", "SpanExporter", "SpanQueue", "Tracer", "carry",
    "carry_into_threads", "emit_annotation", "emit_exception", "emit_message", "emit_object", "emit_reward", "entered",
    "environment", "final_reward", "operation", "rewards_by_span", "root_of_attempt", "send_traceparent",
    "traceparent", "tree", "tree_facts", "tree_lines",
]  # fmt: skip
