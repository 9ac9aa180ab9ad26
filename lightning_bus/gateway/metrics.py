"""What a gateway counts, as Prometheus reads it from /metrics. Labels have few values, and none of them is an address."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from lightning_bus import spans as s
from lightning_bus.gateway.engines import Engine
from lightning_bus.spans import Span

_PREFIX = "lightning_bus_gateway_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SHORT_SECONDS = (0.001, 0.0025, *_SECONDS[:9])


class Meters:
    """One gateway's counters."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.calls = Counter(_PREFIX + "calls", "Model calls recorded", ["route", "outcome"], registry=registry)
        self.untrainable = Counter(
            _PREFIX + "untrainable", "Calls that cannot be trained on", ["reason"], registry=registry
        )
        self.skewed = Counter(
            _PREFIX + "skewed", "Calls sampled otherwise than log-probs say", ["parameter"], registry=registry
        )
        self.refused = Counter(
            _PREFIX + "refused", "Requests refused before an engine was asked", ["reason"], registry=registry
        )
        self.asked_again = Counter(
            _PREFIX + "engine_retries", "Times an engine was asked again for a call", registry=registry
        )
        self.prompts = Counter(
            _PREFIX + "prompts", "Chat calls, by how their prompt became ids", ["source"], registry=registry
        )
        self.render_s = Histogram(
            _PREFIX + "render_seconds", "Until a prompt was ids", buckets=_SHORT_SECONDS, registry=registry
        )
        self.derender_s = Histogram(
            _PREFIX + "derender_seconds", "Ids put into words", buckets=_SHORT_SECONDS, registry=registry
        )
        self.in_flight = Gauge(_PREFIX + "calls_in_flight", "Model calls under way", registry=registry)
        self.call_s = Histogram(
            _PREFIX + "call_seconds", "A model call in all", ["route"], buckets=_SECONDS, registry=registry
        )
        self.first_token_s = Histogram(
            _PREFIX + "first_token_seconds", "Until a stream's first token", buckets=_SECONDS, registry=registry
        )
        self.ack_s = Histogram(_PREFIX + "ack_seconds", "Until a span was durable", buckets=_SECONDS, registry=registry)
        self._spans_refused = Gauge(
            _PREFIX + "spans_refused", "Spans of agents' own that were refused", ["reason"], registry=registry
        )
        self._engine_up = Gauge(_PREFIX + "engine_up", "1 while an engine is well", ["engine"], registry=registry)
        self._engine_calls = Gauge(_PREFIX + "engine_calls", "Calls an engine is at", ["engine"], registry=registry)
        self._engine_version = Gauge(
            _PREFIX + "engine_weight_version", "Of the weights an engine has", ["engine"], registry=registry
        )

    def recorded(self, route: str, spans: Sequence[Span], outcome: str) -> None:
        """Count a call that ended: its spans, and "ok" or why the agent did not get them."""
        first = spans[0]
        self.calls.labels(route, "failed" if outcome == "ok" and first.error else outcome).inc()
        self.call_s.labels(route).observe((first.end_ns - first.start_ns) / 1e9)
        if source := first.attributes.get(s.PROMPT_SOURCE):
            self.prompts.labels(source).inc()
        if s.FIRST_TOKEN_MS in first.attributes:
            self.first_token_s.observe(first.attributes[s.FIRST_TOKEN_MS] / 1000)
        for name in first.attributes.get(s.SKEWED, ()):
            self.skewed.labels(name).inc()
        for span in spans:
            if reason := span.attributes.get(s.UNTRAINABLE):
                self.untrainable.labels(_without_particulars(reason)).inc()

    def text(self, engines: Sequence[Engine], spans_refused: Mapping[str, int]) -> bytes:
        """Return everything in Prometheus's format; spans_refused are those of `/v1/traces`, by reason."""
        for reason, count in spans_refused.items():
            self._spans_refused.labels(reason).set(count)
        for engine in engines:
            self._engine_up.labels(engine.name).set(not engine.unwell)
            self._engine_calls.labels(engine.name).set(engine.in_flight)
            if engine.version.isdecimal():
                self._engine_version.labels(engine.name).set(int(engine.version))
        return generate_latest(self._registry)


def _without_particulars(reason: str) -> str:
    """Return a reason without its numbers and quotations, so that reasons can be counted."""
    return re.sub(r"\d+", "N", reason.partition(": ")[0])
