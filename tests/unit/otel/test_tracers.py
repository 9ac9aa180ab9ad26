"""Both tracers: the light one and OpenTelemetry's, which must leave the same records of the same agent."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from lightning_bus import spans as s
from lightning_bus.adapters import transitions_of
from lightning_bus.errors import CallError
from lightning_bus.otel import emit
from lightning_bus.otel import names as n
from lightning_bus.otel.context import environment, place, traceparent
from lightning_bus.otel.sdk import OtelTracer
from lightning_bus.otel.threads import carry
from lightning_bus.otel.traceparent import format_traceparent, root_of_attempt
from lightning_bus.otel.tracer import Tracer, attempt_number
from lightning_bus.spans import Span
from tests.unit.otel.collected import Collected

pytestmark = pytest.mark.anyio

PROVIDER = TracerProvider()
MAKERS: dict[str, Callable[[], Tracer]] = {
    "light": Tracer,
    "otel": lambda: OtelTracer(provider=PROVIDER, instrument=False),
    "otel switched off": lambda: OtelTracer(enable_otel=False),
}


@pytest.fixture(params=list(MAKERS))
def tracer(request: pytest.FixtureRequest) -> Tracer:
    return MAKERS[request.param]()


@pytest.fixture
def store() -> Collected:
    return Collected()


# -- the tree


def test_spans_hang_from_the_attempts_root(tracer: Tracer, store: Collected) -> None:
    with tracer.trace_context("solve", store=store, rollout_id="r-1", attempt_id=2) as inner:
        with inner.start_as_current_span("outer"), inner.start_as_current_span("inner"):
            pass
        with inner.start_as_current_span("next"):
            pass
    trace_id, root_id = root_of_attempt("r-1", 2)
    assert store.named("solve").parent_id == root_id
    assert {span.trace_id for span in store.spans} == {trace_id}
    assert {(span.rollout_id, span.attempt) for span in store.spans} == {("r-1", 2)}
    assert [store.parent_of(name) for name in ("inner", "outer", "next")] == ["outer", "solve", "solve"]
    assert [span.sequence for span in store.spans] == [1, 2, 3, 4]
    assert store.flushed == [("r-1", 2)]
    assert place.get() is None


async def test_it_is_the_same_in_async_code(tracer: Tracer, store: Collected) -> None:
    @tracer.operation
    async def search(query: str, *, limit: int = 3) -> list[str]:
        await anyio.lowlevel.checkpoint()
        tracer.emit_message("found")
        return [query]

    async with tracer.trace_context("solve", store=store, rollout_id="r-1"):
        async with tracer.span("step"):
            await search("weather", limit=2)
    assert [store.parent_of(name) for name in (n.MESSAGE_SPAN_NAME, "search", "step")] == ["search", "step", "solve"]
    assert store.named("search").attributes == {
        "lightning.operation.input.query": "weather",
        "lightning.operation.input.limit": 2,
        "lightning.operation.output": '["weather"]',
    }


def test_an_exception_is_told_and_goes_on(tracer: Tracer, store: Collected) -> None:
    with tracer.trace_context("solve", store=store, rollout_id="r-1"):
        with pytest.raises(ZeroDivisionError), tracer.span("step"):
            1 / 0  # noqa: B018
    step = store.named("step")
    assert step.error == "ZeroDivisionError: division by zero"
    assert step.attributes[n.EXCEPTION_TYPE] == "ZeroDivisionError"
    assert "test_an_exception_is_told" in step.attributes[n.EXCEPTION_STACKTRACE]
    assert not store.named("solve").error


async def test_cancellation_is_told_too(tracer: Tracer, store: Collected) -> None:
    async with tracer.trace_context("solve", store=store, rollout_id="r-1"):
        with anyio.move_on_after(0):
            async with tracer.span("step"):
                await anyio.sleep_forever()
    assert "CancelledError" in store.named("step").error


def test_both_paths_leave_the_same_records() -> None:
    stores = {name: Collected() for name in MAKERS}
    for name, made in MAKERS.items():
        with made().trace_context("solve", store=stores[name], rollout_id="r-1") as tracer:
            _agent(tracer)
    light = stores["light"].spans
    assert len(light) == 13
    for other in stores.values():
        assert [_comparable(span, other.spans) for span in other.spans] == [_comparable(span, light) for span in light]
        mine, theirs = (transitions_of("r-1", 1, "g", spans) for spans in (light, other.spans))
        assert mine.calls == theirs.calls == 1
        (ours,), (row,) = mine.rows, theirs.rows
        assert (ours.token_ids == row.token_ids).all() and (ours.logprobs == row.logprobs).all()
        assert (ours.version_oldest, ours.version_newest) == (row.version_oldest, row.version_newest) == (7, 7)


def _agent(tracer: Any) -> None:
    """Do one of everything."""
    call = {
        s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: [1, 2, 3], s.RESPONSE_IDS: s.pack_ids([4, 5]),
        s.LOGPROBS: [-0.1, -0.25], s.WEIGHT_VERSIONS: [["7", 0, 2]], s.TEMPERATURE: 1,
    }  # fmt: skip
    with emit.operation("chat", **call) as chat:
        pass
    emit.emit_reward(1, "exact")
    emit.emit_reward(0.5, span=chat.span.span_id.hex())
    emit.emit_reward({"speed": 0.2, "answer": True}, primary_key="answer")
    emit.emit_annotation({"a": {"b": [1, 2.5], "c": None}, "big": 2**70, "raw": b"\x00\xff", "mixed": [1, "x", None]})
    emit.emit_object({"list": [1, {"deep": None}]})
    emit.emit_message("hello", {"level": "info"})
    emit.emit_exception(KeyError("gone"))
    with pytest.raises(ValueError, match="broken"), tracer.start_as_current_span("fails"):
        raise ValueError("broken")
    with tracer.start_as_current_span("agentlightning.operation"):
        emit.emit_annotation({"agentlightning.reward": [1]})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(emit.emit_message, "from a thread").result()


def _comparable(span: Span, spans: list[Span]) -> tuple[Any, ...]:
    ids = {each.span_id: at for at, each in enumerate(spans)}
    attributes = {name: value for name, value in span.attributes.items() if name != n.EXCEPTION_STACKTRACE}
    target = attributes.pop(n.REWARD_SPAN, None)
    above = ids.get(span.parent_id or b"", span.parent_id)
    return (
        span.name,
        above,
        attributes,
        target and ids[bytes.fromhex(target)],
        span.error,
        span.sequence,
        span.trace_id,
    )


# -- many at a time


async def test_200_concurrent_rollouts_in_one_process_keep_their_spans_apart(tracer: Tracer, store: Collected) -> None:
    """Fails with any state that is the process's: every step lets all the others run in between."""

    async def rollout(number: int) -> None:
        name = f"r-{number}"
        async with tracer.trace_context(f"solve {name}", store=store, rollout_id=name, attempt_id=number % 3 + 1):
            for step in range(3):
                async with tracer.span(f"{name} step {step}"):
                    await asyncio.sleep(0)
                    await anyio.to_thread.run_sync(emit.emit_annotation, {"of": name})
                    await anyio.lowlevel.checkpoint()
                    await _told_by_a_child(name)
            emit.emit_reward(float(number))

    async def _told_by_a_child(name: str) -> None:
        async def child() -> None:
            await anyio.lowlevel.checkpoint()
            emit.emit_message(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            tasks.start_soon(child)

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(rollout, number)

    by_id = {span.span_id: span for span in store.spans}
    assert len(by_id) == 200 * (1 + 3 + 3 + 6 + 1)
    for span in store.spans:
        number = int(span.rollout_id[2:])
        assert span.attempt == number % 3 + 1
        assert span.trace_id == root_of_attempt(span.rollout_id, span.attempt)[0]
        told = span.attributes.get("of") or span.attributes.get(n.MESSAGE_BODY)
        if told is not None:
            assert told == span.rollout_id
            assert by_id[span.parent_id or b""].name.startswith(f"{span.rollout_id} step")
        elif s.REWARD in span.attributes:
            assert span.attributes[s.REWARD] == number
        else:
            assert span.rollout_id in span.name.split()


async def test_a_generator_left_elsewhere_does_not_break_its_neighbours(tracer: Tracer, store: Collected) -> None:
    async def steps() -> AsyncGenerator[int]:
        with tracer.span("generator"):
            yield 1

    async with tracer.trace_context("solve", store=store, rollout_id="r-1"):
        found = steps()
        await asyncio.create_task(anext(found), context=contextvars.copy_context())  # type: ignore[arg-type]
        await found.aclose()
        emit.emit_message("after")
    assert store.parent_of(n.MESSAGE_SPAN_NAME) == "solve"
    assert store.named("generator").parent_id == store.named("solve").span_id


# -- threads, processes, frameworks


def test_threads_and_pools_go_where_they_were_started(tracer: Tracer, store: Collected) -> None:
    def tell(text: str) -> None:
        emit.emit_message(text, {"thread": threading.current_thread().name})

    with ThreadPoolExecutor(1) as pool:
        with tracer.trace_context("one", store=store, rollout_id="r-1"):
            with tracer.span("step"):
                thread = threading.Thread(target=tell, args=("thread",))
                thread.start()
                thread.join()
            pool.submit(tell, "pool").result()
            later = carry(tell)
        with tracer.trace_context("two", store=store, rollout_id="r-2"):
            pool.submit(tell, "pool again").result()  # in the thread that r-1 began
        with pytest.raises(CallError, match="no attempt is being traced"):
            pool.submit(tell, "from nowhere").result()
        later("carried")
    owners = {
        span.attributes[n.MESSAGE_BODY]: span.rollout_id
        for span in store.spans
        if s.REWARD not in span.attributes and n.MESSAGE_BODY in span.attributes
    }
    assert owners == {"thread": "r-1", "pool": "r-1", "pool again": "r-2", "carried": "r-1"}
    thread_span = next(span for span in store.spans if span.attributes.get(n.MESSAGE_BODY) == "thread")
    assert thread_span.parent_id == store.named("step").span_id


def test_a_framework_that_loses_opentelemetrys_context_is_hung_where_it_ran(store: Collected) -> None:
    tracer = MAKERS["otel"]()
    framework = PROVIDER.get_tracer("framework")
    with tracer.trace_context("solve", store=store, rollout_id="r-1"), tracer.span("step"):
        with framework.start_as_current_span("own trace", context=trace.set_span_in_context(trace.INVALID_SPAN)):
            with framework.start_as_current_span("below it", kind=trace.SpanKind.CLIENT):
                pass
    assert store.parent_of("own trace") == "step"
    assert store.parent_of("below it") == "own trace"
    assert store.named("below it").attributes == {n.SCOPE: "framework", n.KIND: "client"}


def test_spans_outside_any_attempt_are_not_ours(store: Collected) -> None:
    MAKERS["otel"]()
    with PROVIDER.get_tracer("framework").start_as_current_span("elsewhere"):
        pass
    assert not store.spans


def test_traceparent_names_the_innermost_span(tracer: Tracer, store: Collected) -> None:
    with tracer.trace_context("solve", store=store, rollout_id="r-1"), tracer.span("step") as step:
        assert traceparent() == format_traceparent(root_of_attempt("r-1", 1)[0], step.span_id)


def test_a_subprocess_is_told_where_it_belongs_by_its_environment(tracer: Tracer, store: Collected) -> None:
    store.address, store.token = "http://127.0.0.1:1", "secret"  # type: ignore[attr-defined]
    with tracer.trace_context("solve", store=store, rollout_id="r-1", attempt_id=3), tracer.span("step") as step:
        told = environment()
        code = "from lightning_bus.otel.context import environment as e; import json; print(json.dumps(e()))"
        child = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **told}, capture_output=True, text=True, check=True
        )
    assert told["TRACEPARENT"].split("-")[2] == step.span_id.hex()
    assert told["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "http://127.0.0.1:1/rollout/r-1/attempt/3/v1/traces"
    assert json.loads(child.stdout) == told


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BUS_ROLLOUT", "r-1")
    with pytest.raises(CallError, match="LIGHTNING_BUS_ADDRESS"):
        emit.emit_reward(1.0)


@pytest.mark.parametrize("httpx", [import_module("httpx"), *([import_module("httpx2")] if find_spec("httpx2") else [])])
async def test_requests_to_the_attempts_own_gateway_name_the_span_they_were_made_in(
    tracer: Tracer, store: Collected, httpx: Any
) -> None:
    seen: list[Any] = []

    def answer(request: Any) -> Any:
        seen.append(request.headers.get("traceparent"))
        return httpx.Response(200)

    store.address = "http://gateway:1"  # type: ignore[attr-defined]
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport) as http:
        async with tracer.trace_context("solve", store=store, rollout_id="r-1"), tracer.span("step"):
            ours = traceparent()
            await http.post("http://gateway:1/rollout/r-1/attempt/1/v1/chat/completions")
            await http.post("http://gateway:1/v1/models", headers={"traceparent": "its own"})
            await http.get("http://gateway:11/elsewhere")
            with httpx.Client(transport=transport) as blocking:
                blocking.get("http://gateway:1/v1/models")
        await http.get("http://gateway:1/outside")
    assert seen == [ours, "its own", None, ours, None]


# -- what is refused


def test_emitters_outside_an_attempt_say_so() -> None:
    with pytest.raises(CallError, match="no attempt is being traced"):
        emit.emit_reward(1.0)


def test_a_context_without_a_store_or_a_rollout_says_so(tracer: Tracer) -> None:
    with pytest.raises(CallError, match="names no rollout_id"), tracer.trace_context("solve"):
        pass
    with pytest.raises(CallError, match="has no store"), tracer.trace_context("solve", rollout_id="r-1"):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, [1.0]])
def test_a_reward_is_a_finite_number(value: Any) -> None:
    with pytest.raises(ValueError, match="a reward is a finite number"):
        emit.emit_reward(value)


def test_a_reward_of_several_names_its_primary_one() -> None:
    with pytest.raises(ValueError, match="primary_key is ''; it must be one of 'a', 'b'"):
        emit.emit_reward({"a": 1.0, "b": 2.0})


def test_attempts_are_numbers() -> None:
    assert [attempt_number(given) for given in (None, 2, "3", "attempt-4", "at-5")] == [1, 2, 3, 4, 5]
    for given in ("at-37cc5f24", "", 0, -1, "one"):
        with pytest.raises(ValueError, match="a number from 1 on"):
            attempt_number(given)
