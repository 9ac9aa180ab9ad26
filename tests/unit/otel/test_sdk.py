"""OtelTracer beside what else there is of OpenTelemetry in a process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lightning_bus.otel import OtelTracer, sdk
from lightning_bus.otel import names as n
from lightning_bus.otel.queue import quiet
from tests.unit.otel.collected import Collected

ROOT = Path(__file__).resolve().parent.parent.parent.parent


@dataclass
class Instrumentor:
    """What an installed instrumentation package announces."""

    name: str
    error: str = ""
    providers: list[Any] = field(default_factory=list)
    is_instrumented_by_opentelemetry: bool = False
    package: str = "package"

    @property
    def value(self) -> str:
        return f"{self.package}:{self.name}"

    def load(self) -> Any:
        return lambda: self

    def instrument(self, *, tracer_provider: Any) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.providers.append(tracer_provider)


def test_installed_instrumentors_are_switched_on_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, foreign, broken = Instrumentor("openai-v2"), Instrumentor("flask"), Instrumentor("langchain", "wrong version")
    theirs, other = Instrumentor("openai"), Instrumentor("crewai")
    groups = {"opentelemetry_instrumentor": [ours, foreign, broken], "openinference_instrumentor": [theirs, other]}
    monkeypatch.setattr(sdk, "entry_points", lambda group: groups[group])
    provider = TracerProvider()
    for _ in range(2):
        OtelTracer(provider=provider)
    assert len(ours.providers) == len(other.providers) == 1
    assert not theirs.providers  # its calls would stand there twice
    assert not foreign.providers  # no model client, and spans of every request of a server are not wanted
    assert "package:langchain cannot be used: wrong version" in caplog.text


def test_opentelemetrys_own_instrumentor_goes_first_and_a_broken_one_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in ("", "wrong version"):
        theirs, ours = Instrumentor("openai"), Instrumentor("openai_v2", error, package="opentelemetry.openai_v2")
        # OpenInference's stand in both groups.
        groups = {"opentelemetry_instrumentor": [theirs, ours], "openinference_instrumentor": [theirs]}
        monkeypatch.setattr(sdk, "entry_points", lambda group, groups=groups: groups[group])
        provider = TracerProvider()
        OtelTracer(provider=provider)
        assert (len(ours.providers), len(theirs.providers)) == ((0, 1) if error else (1, 0))


def test_a_provider_that_is_there_keeps_its_own_exporters() -> None:
    provider, theirs, store = TracerProvider(), InMemorySpanExporter(), Collected()
    provider.add_span_processor(SimpleSpanProcessor(theirs))
    for _ in range(2):  # two tracers on one provider are one processor
        tracer = OtelTracer(provider=provider, instrument=False)
    with tracer.trace_context("solve", store=store, rollout_id="r-1"):
        tracer.emit_message("hello")
    assert [span.name for span in theirs.get_finished_spans()] == [span.name for span in store.spans]
    assert len(store.spans) == 2


def test_events_and_links_are_kept() -> None:
    provider, store = TracerProvider(), Collected()
    tracer = OtelTracer(provider=provider, instrument=False)
    with tracer.trace_context("solve", store=store, rollout_id="r-1") as otel:
        with otel.start_as_current_span("first") as first:
            first.add_event("retry", {"after_s": 2})
        with otel.start_as_current_span("second", links=[sdk.import_module("opentelemetry.trace").Link(first.context)]):
            pass
    (event,) = store.named("first").attributes[n.EVENTS]
    assert (event[0], event[2]) == ("retry", {"after_s": 2})
    (link,) = store.named("second").attributes[n.LINKS]
    assert link[1] == store.named("first").span_id.hex()


def test_what_sending_does_is_not_recorded() -> None:
    """An instrumented HTTP client in the exporter would otherwise make more to send, for ever."""
    provider, store = TracerProvider(), Collected()
    tracer = OtelTracer(provider=provider, instrument=False)
    with tracer.trace_context("solve", store=store, rollout_id="r-1"):
        before = quiet.set(True)
        with provider.get_tracer("httpx").start_as_current_span("POST"):
            pass
        quiet.reset(before)
    assert [span.name for span in store.spans] == ["solve"]


CHECK = """
import os, sys
os.environ["OTEL_TRACES_SAMPLER"] = "always_off"
import lightning_bus.otel
assert not [name for name in sys.modules if name.startswith("opentelemetry")], "imported before it is needed"
from lightning_bus.otel import OtelTracer
from tests.unit.otel.collected import Collected
store = Collected()
with OtelTracer(instrument=False).trace_context("solve", store=store, rollout_id="r-1") as otel:
    with otel.start_as_current_span("many", attributes={f"a{at}": at for at in range(500)}):
        pass
assert len(store.named("many").attributes) == 500
"""


def test_nothing_is_imported_early_sampled_away_or_cut_short() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True, cwd=ROOT)
