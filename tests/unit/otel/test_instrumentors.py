"""The instrumentors that people have: what they tell of a model call stands above the gateway's record of it, once.

Both are the real packages, switched on as OtelTracer does it, with the real client against the gateway before a stub
engine. What they change in the client is undone after each test.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

import pytest
from opentelemetry.sdk.trace import TracerProvider

from lightning_bus import Span, root_of_attempt
from lightning_bus import spans as s
from lightning_bus.adapters import transitions_of
from lightning_bus.otel import OtelTracer, sdk
from lightning_bus.otel import names as n
from lightning_bus.spans import is_model_call
from tests.gateway_fixtures import QUESTION, RESPONSE_IDS, World, open_world
from tests.unit.otel.collected import Collected

PACKAGES = ["opentelemetry.instrumentation.openai_v2", "openinference.instrumentation.openai"]


class CollectedBesideGateway(Collected):
    """A store that says where its attempts' gateway is, as the exporter through the gateway does."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make one instrumentor the only one that is installed."""
    found = [entry for group in sdk.INSTRUMENTOR_GROUPS for entry in entry_points(group=group)]
    entry = next(entry for entry in found if entry.module == request.param)

    def only(group: str) -> list[EntryPoint]:
        return [entry] if entry.group == group else []

    monkeypatch.setattr(sdk, "entry_points", only)
    yield entry.module
    entry.load()().uninstrument()


@pytest.fixture
def world() -> Iterator[World]:
    with open_world() as opened:
        yield opened


@pytest.mark.parametrize("streamed", [False, True])
def test_an_instrumented_call_is_one_model_call_below_the_span_of_its_instrumentor(
    package: str, world: World, streamed: bool
) -> None:
    store = CollectedBesideGateway(world.url)
    tracer = OtelTracer(provider=TracerProvider())
    client = world.client()
    with tracer.trace_context("solve", store=store, rollout_id="r-1", attempt_id=2):
        with tracer.span("think"):
            if streamed:
                assert list(client.chat.completions.create(model="policy", messages=QUESTION, stream=True))
            else:
                assert client.chat.completions.create(model="policy", messages=QUESTION).choices
        tracer.emit_reward(1.0)

    [told] = [span for span in store.spans if str(span.attributes.get(n.SCOPE, "")).startswith(package)]
    assert told.parent_id == store.named("think").span_id
    [recorded] = world.bus.spans
    assert recorded.parent_id == told.span_id
    assert {told.trace_id, recorded.trace_id} == {root_of_attempt("r-1", 2)[0]}
    assert (told.rollout_id, told.attempt) == ("r-1", 2)
    # Only the gateway has token ids, so only its record is a call to learn from.
    assert not is_model_call(told)
    log: list[Span] = [*store.spans, *world.bus.spans]
    learned = transitions_of("r-1", 2, "", log)
    assert learned.calls == 1 and not learned.dropped
    [row] = learned.rows
    assert row.token_ids[row.trained].tolist() == RESPONSE_IDS
    assert recorded.attributes[s.REQUEST_MODEL] == "policy"
