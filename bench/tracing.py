"""What does tracing cost an agent, and how fast do its spans become durable?

span_us          an agent's CPU time for one span with 5 attributes, opened and closed by the light tracer
otel_span_us     the same by OtelTracer, so OpenTelemetry's SDK included; null where it is not installed
otel_bare_us     the same by OpenTelemetry's SDK alone, with no processor: what its spans cost without us
emit_us          one emit_reward
put_us           the part of it that hands a finished span to the exporter
exporter_spans_per_s   one process, the light tracer's spans from first to durable, through a broker
otlp_us          the gateway's CPU time for one span of an OTLP export of 500 (protobuf; otlp_json_us: JSON), without the bus

Each figure is the median of `n` rounds; the spread is [least, greatest].

    python -m bench.tracing --json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import anyio
import msgspec

from bench import common
from lightning_bus import BlockingClient, Submission, Task
from lightning_bus.otel import OtelTracer, SpanExporter, Tracer, emit_reward
from lightning_bus.otel.otlp import decode_protobuf
from lightning_bus.otel.otlp_json import decode_json
from lightning_bus.otel.queue import Key
from lightning_bus.spans import Span

SPANS = 2000  # of a round
THROUGHPUT_SPANS = 20_000
OTLP_SPANS = 500
ATTRIBUTES: dict[str, Any] = {
    "query": "the weather in Oslo", "hits": 3, "score": 0.5, "cached": False, "source": "index-7",
}  # fmt: skip


class Dropped:
    """A store that keeps nothing: what is left is the tracer's own work."""

    def put(self, span: Span) -> None: ...
    def flush(self, key: Key | None = None, *, limit_s: float = 0.0) -> None: ...
    async def wait_flushed(self, key: Key | None = None, *, limit_s: float = 0.0) -> None: ...


def main() -> None:
    options = common.parse(common.parser(__doc__, seconds=1.0, runs=9))
    count = SPANS // 10 if options.quick else SPANS
    rates: dict[str, list[float]] = {}
    exporter = SpanExporter("tcp://127.0.0.1:9")
    exporter._thread = object()  # type: ignore[assignment]  # never started: only `put` is measured
    span = Span(b"s" * 8, b"t" * 16, b"p" * 8, "search", 1, 2, ATTRIBUTES, "r-1", 1, 1)
    rounds: dict[str, Callable[[], float]] = {
        "span_us": lambda: _traced(Tracer(Dropped()), count),
        "emit_us": lambda: _emitted(Tracer(Dropped()), count),
        "put_us": lambda: _cpu_us(lambda: exporter.put(span), count),
        "otlp_us": lambda: _decoded("protobuf"),
        "otlp_json_us": lambda: _decoded("json"),
    }
    if find_spec("opentelemetry.sdk"):
        from opentelemetry.sdk.trace import TracerProvider

        tracer, bare = OtelTracer(store=Dropped(), instrument=False), TracerProvider().get_tracer("bare")
        rounds["otel_span_us"] = lambda: _traced(tracer, count)
        rounds["otel_bare_us"] = lambda: _spans(bare.start_as_current_span, count)
    for _ in range(options.runs):  # in turns: a shared machine changes by the minute
        for name, measure in rounds.items():
            rates.setdefault(name, []).append(measure())
        exporter._reset()
    with common.workspace(options.dir) as directory:
        with common.broker(directory / "log") as broker:
            for run in range(max(1, options.runs // 3)):
                rates.setdefault("exporter_spans_per_s", []).append(
                    _exported(broker.address, f"r-{run}", THROUGHPUT_SPANS // (10 if options.quick else 1))
                )
        summary: dict[str, Any] = {"bench": "tracing", "machine": common.machine(directory)}
    names = [*rounds, "exporter_spans_per_s"]
    digits = {name: 0 if name.endswith("per_s") else 2 for name in names}
    summary |= {"n": options.runs, "spans": count, "attributes": len(ATTRIBUTES)}
    summary |= {name: common.median(rates[name], digits[name]) for name in names}
    summary["spread"] = {name: common.spread(rates[name], digits[name]) for name in names}
    common.finish(summary, options.json)


def _traced(tracer: Tracer, count: int) -> float:
    with tracer.trace_context("bench", rollout_id="r-1") as inner:
        return _spans(inner.start_as_current_span, count)


def _spans(start: Callable[..., Any], count: int) -> float:
    def one() -> None:
        with start("search", attributes=ATTRIBUTES):
            pass

    return _cpu_us(one, count)


def _emitted(tracer: Tracer, count: int) -> float:
    with tracer.trace_context("bench", rollout_id="r-1"):
        return _cpu_us(lambda: emit_reward(1.0), count)


def _cpu_us(work: Callable[[], Any], count: int) -> float:
    began = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - began) / count * 1e6


def _decoded(kind: str) -> float:
    pairs = [{"key": name, "value": {"stringValue": str(value)}} for name, value in ATTRIBUTES.items()]
    if kind == "json":
        spans = [
            {
                "traceId": "0a" * 16,
                "spanId": f"{at:016x}",
                "name": "search",
                "startTimeUnixNano": "1",
                "attributes": pairs,
            }
            for at in range(1, OTLP_SPANS + 1)
        ]
        body = msgspec.json.encode({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})
        return _cpu_us(lambda: decode_json(body), 1) / OTLP_SPANS
    attributes = b"".join(
        _field(9, _field(1, name.encode()) + _field(2, _field(1, str(value).encode())))
        for name, value in ATTRIBUTES.items()
    )
    spans_ = b"".join(
        _field(2, _field(1, b"t" * 16) + _field(2, at.to_bytes(8, "big")) + _field(5, b"search") + attributes)
        for at in range(1, OTLP_SPANS + 1)
    )
    body = _field(1, _field(2, spans_))
    return _cpu_us(lambda: decode_protobuf(body), 1) / OTLP_SPANS


def _field(number: int, value: bytes) -> bytes:
    size, head = len(value), bytearray([number << 3 | 2])
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(head) + bytes([size]) + value


def _exported(address: str, rollout_id: str, count: int) -> float:
    """Return spans a second from an agent's first span until the last is durable."""
    _lease(address, rollout_id)
    with SpanExporter(address) as exporter:
        tracer = Tracer(exporter)
        with tracer.trace_context("warm", rollout_id=rollout_id):
            pass
        began = time.perf_counter()
        with tracer.trace_context("bench", rollout_id=rollout_id):
            for _ in range(count):
                with tracer.span("search", ATTRIBUTES):
                    pass
        return count / (time.perf_counter() - began)


def _lease(address: str, rollout_id: str) -> Task:
    """Have an attempt of this rollout that runs for the broker's lease, which is longer than a round."""
    from lightning_bus import Client

    async def lease() -> Task:
        async with Client(address) as bus, bus.lease(1) as leases:
            async for task in leases:
                return task
        raise AssertionError("the broker stopped")

    with BlockingClient(address) as bus:
        bus.submit([Submission(rollout_id, b"")])
    return anyio.run(lease)


if __name__ == "__main__":
    main()
