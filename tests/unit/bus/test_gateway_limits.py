"""What the gateway refuses, what it counts, and what it does when an engine or the broker is away."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lightning_bus import spans as s
from lightning_bus import tokens
from lightning_bus.broker.server import serve_broker
from lightning_bus.client import Client
from lightning_bus.clock import wall_ns
from lightning_bus.config import BrokerSection, GatewaySection
from lightning_bus.errors import FencedError
from lightning_bus.gateway.daemon import serve_gateway
from lightning_bus.spans import Span, model_call
from tests.gateway_fixtures import (
    PATIENCE_S,
    QUESTION,
    SECRET,
    Engine,
    World,
    get,
    open_world,
    post,
    serving,
    until,
)


@pytest.fixture
def world() -> Iterator[World]:
    with open_world() as opened:
        yield opened


def metric(world: World, line: str) -> float:
    """The value of one line of /metrics, which must be there."""
    lines = get(f"{world.url}/metrics").text.splitlines()
    return float(next(one for one in lines if one.startswith(f"lightning_bus_gateway_{line} ")).rpartition(" ")[2])


# -- tokens and limits


def test_an_expired_key_is_refused_and_counted(world: World) -> None:
    now_s = wall_ns() / 1e9
    late, early = (tokens.Claims("r-1", 2, expires_wall_s=now_s + offset) for offset in (-5000.0, 3600.0))
    with pytest.raises(openai.AuthenticationError, match=r"expired 50\d\d s ago"):
        world.client(late).chat.completions.create(model="policy", messages=QUESTION)
    assert world.engine.requests == []
    world.client(early).chat.completions.create(model="policy", messages=QUESTION)
    assert metric(world, 'refused_total{reason="token"}') == 1


def test_no_engine_works_for_an_attempt_that_is_known_to_be_over(world: World) -> None:
    world.bus.error = FencedError("rollout r-1 attempt 2 was given to another worker.")
    create = partial(world.client().chat.completions.create, model="policy", messages=QUESTION)
    with pytest.raises(openai.ConflictError, match="attempt is over"):
        create()
    with pytest.raises(openai.AuthenticationError, match="attempt is over"):
        create()
    assert len(world.engine.requests) == 1
    assert metric(world, 'calls_total{outcome="fenced",route="/v1/chat/completions"}') == 1


def test_an_attempt_may_have_so_many_calls_under_way_and_no_more() -> None:
    with open_world(calls_per_attempt_max=1) as world:
        world.engine.stream_goes_on = threading.Event()
        stream = world.client().chat.completions.create(model="policy", messages=QUESTION, stream=True)
        with pytest.raises(openai.RateLimitError, match="1 calls under way") as caught:
            world.client().chat.completions.create(model="policy", messages=QUESTION)
        assert caught.value.response.headers["retry-after"] == "1"
        other = tokens.Claims("r-2", 1)
        world.client(other).chat.completions.create(model="policy", messages=QUESTION)
        world.engine.stream_goes_on.set()
        assert list(stream)[-1].choices[0].finish_reason == "stop"
        world.client(max_retries=3).chat.completions.create(model="policy", messages=QUESTION)
    assert len(world.bus.spans) == 3


def test_agents_are_not_told_where_engines_are() -> None:
    with open_world(admission_wait_s=0.1) as world:
        engine_port = world.engine_url.rpartition(":")[2]
        world.engine.refusals = [Response("swapping", 503) for _ in range(20)]
        answer = post(f"{world.url}/v1/chat/completions", json={"model": "policy", "messages": QUESTION})
        pages = [answer.text, get(f"{world.url}/health").text, get(f"{world.url}/metrics").text]
    assert answer.status_code == 503 and "engine 1 took no call" in answer.text
    alone = rf"(?<![\d.]){engine_port}(?![\d.])"  # among the digits of a measured time it would be chance
    assert not any(re.search(alone, page) for page in pages)


# -- what the span says beside tokens


def test_a_span_tells_who_asked_and_with_which_parameters(world: World, caplog: pytest.LogCaptureFixture) -> None:
    baggage = {"baggage": f"user=x, {s.AGENT_NAME}=calculator%20two;p=1", "user-agent": "agent/1.0"}
    with caplog.at_level(logging.ERROR):
        world.client().chat.completions.create(
            model="policy", messages=QUESTION, n=2, seed=7, presence_penalty=0.5, stop=["END"], extra_headers=baggage
        )
    first, second = world.bus.spans
    expected = {
        s.AGENT_NAME: "calculator two", s.USER_AGENT: "agent/1.0", s.SEED: 7, s.PRESENCE_PENALTY: 0.5, s.STOP: ["END"],
        s.CHOICE_COUNT: 2, s.SKEWED: ["presence_penalty"],
    }  # fmt: skip
    assert expected.items() <= first.attributes.items()
    assert s.CHOICE not in first.attributes and second.attributes[s.CHOICE] == 1
    assert s.ROUTE not in first.attributes and s.ORIGINAL_REQUEST not in first.attributes
    assert metric(world, 'skewed_total{parameter="presence_penalty"}') == 1


def test_what_the_agent_sent_is_kept_where_the_rollout_overrides_it(world: World) -> None:
    claims = tokens.Claims("r-1", 1, overrides={"temperature": 0.25})
    world.client(claims).chat.completions.create(model="policy", messages=QUESTION, temperature=1.0)
    attributes = world.bus.spans[0].attributes
    assert json.loads(attributes[s.ORIGINAL_REQUEST])["temperature"] == 1.0
    assert json.loads(attributes[s.REQUEST_BODY])["temperature"] == 0.25


def test_what_run_toml_overrides_holds_for_all_and_a_submission_wins() -> None:
    with open_world(overrides={"top_p": 1.0, "temperature": 0.7}) as world:
        claims = tokens.Claims("r-1", 1, overrides={"temperature": 0.25})
        for client in (world.client(), world.client(claims)):
            client.chat.completions.create(model="policy", messages=QUESTION, top_p=0.5)
    assert [(asked["top_p"], asked["temperature"]) for asked in world.engine.requests] == [(1.0, 0.7), (1.0, 0.25)]


def test_the_name_in_x_agent_name_wins(world: World) -> None:
    headers = {"x-agent-name": "planner", "baggage": f"{s.AGENT_NAME}=other"}
    world.client().chat.completions.create(model="policy", messages=QUESTION, extra_headers=headers)
    assert world.bus.spans[0].attributes[s.AGENT_NAME] == "planner"


# -- engines that answer nonsense


@pytest.mark.parametrize(
    "answer",
    [
        PlainTextResponse("<html>"),
        JSONResponse([1]),
        JSONResponse({"choices": "none"}),
        JSONResponse({"choices": [{"message": 3, "token_ids": {"a": 1}, "logprobs": [1], "weight_versions": [{}]}]}),
        JSONResponse({"choices": [{"weight_versions": [{"version": 1, "start": "x", "end": 2}]}]}),
        Response(b"[" * 100_000),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_engine_that_answers_nonsense_is_recorded_as_untrainable(world: World, answer: Response, path: str) -> None:
    world.engine.refusals = [answer]
    asked = {"model": "policy", "messages": QUESTION, "input": "2 + 2?", "max_tokens": 8}
    told = post(world.url + path, json=asked)
    assert told.status_code in (200, 502)
    if told.status_code == 502:
        assert told.json()["error"]["message"]
    [span] = world.bus.spans
    assert model_call(span).untrainable


@pytest.mark.parametrize(
    "event", ["{", "[1]", '{"choices": [3]}', '{"choices": [{"index": "x", "delta": {}}]}', '{"error": "no"}']
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_engine_that_streams_nonsense_is_recorded_as_untrainable(world: World, event: str, path: str) -> None:
    world.engine.refusals = [Response(f"data: {event}\n\n", media_type="text/event-stream")]
    asked = {"model": "policy", "messages": QUESTION, "input": "2 + 2?", "max_tokens": 8, "stream": True}
    told = post(world.url + path, json=asked)
    assert told.status_code == 200 and '"error"' in told.text
    [span] = world.bus.spans
    assert model_call(span).untrainable


def test_what_is_nested_too_deeply_is_refused(world: World) -> None:
    answer = post(
        f"{world.url}/v1/chat/completions", content=b"[" * 9_000, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, "nested" in answer.text) == (400, True)


def test_an_engines_refusal_in_another_shape_is_put_into_the_sdks(world: World) -> None:
    world.engine.refusals = [JSONResponse({"detail": "no such tool"}, 422), PlainTextResponse("gone wrong", 500)]
    create = partial(world.client().chat.completions.create, model="policy", messages=QUESTION)
    with pytest.raises(openai.UnprocessableEntityError, match="The engine answered 422: no such tool"):
        create()
    with pytest.raises(openai.InternalServerError, match="The engine answered 500: gone wrong"):
        create()


def test_an_agent_that_leaves_before_the_answer_stops_the_engine_and_is_in_the_log(world: World) -> None:
    world.engine.keeps_silent = True

    async def leave_once_the_engine_is_asked() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http, anyio.create_task_group() as tasks:
            asked = {"model": "policy", "messages": QUESTION}
            tasks.start_soon(partial(http.post, f"{world.url}/v1/chat/completions", json=asked))
            while not world.engine.requests:  # noqa: ASYNC110 - it is asked in another thread, which has no event for it
                await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()

    anyio.run(leave_once_the_engine_is_asked)
    assert world.engine.stream_ends.wait(PATIENCE_S)
    world.engine.keeps_silent = False
    world.client().chat.completions.create(model="policy", messages=QUESTION)
    until(lambda: len(world.bus.spans) == 2)
    first = min(world.bus.spans, key=lambda span: span.start_ns)
    assert (first.attributes[s.UNTRAINABLE], first.error) == ("no answer", "client went away")


# -- a broker that is away for a while


@pytest.mark.anyio
async def test_a_broker_that_is_away_is_only_latency_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    address = "tcp://127.0.0.1:*"
    agents, calls_each = 4, 5
    half, gateway_up, broker_down = anyio.Event(), anyio.Event(), anyio.Event()
    at: list[str] = []
    done: list[httpx.Response] = []

    async def broker(scope: anyio.CancelScope, up: anyio.Event) -> None:
        def bound(at: str) -> None:
            nonlocal address
            address = at
            up.set()

        with scope:
            await serve_broker(BrokerSection(bind=address), tmp_path, SECRET, started=bound)
        broker_down.set()

    async def agent() -> None:
        async with httpx.AsyncClient(timeout=2 * PATIENCE_S) as http:
            for _ in range(calls_each):
                asked = {"model": "policy", "messages": QUESTION}
                answer = await http.post(at[0] + "/v1/chat/completions", json=asked)
                assert answer.status_code == 200, answer.text
                done.append(answer)
                if len(done) == agents * calls_each // 2:
                    half.set()

    def started(url: str) -> None:
        at.append(url)
        gateway_up.set()

    with serving(Engine().app()) as upstream:
        section = GatewaySection(bind="127.0.0.1:0", upstreams=[upstream], admission_wait_s=PATIENCE_S)
        async with anyio.create_task_group() as tasks:
            first, up = anyio.CancelScope(), anyio.Event()
            tasks.start_soon(broker, first, up)
            await up.wait()
            tasks.start_soon(partial(serve_gateway, section, bus_address=address, secret=SECRET, started=started))
            await gateway_up.wait()
            async with anyio.create_task_group() as calling:
                for _ in range(agents):
                    calling.start_soon(agent)
                await half.wait()
                first.cancel()  # calls are under way now, and wait for an acknowledgement that does not come
                await broker_down.wait()
                second, up = anyio.CancelScope(), anyio.Event()
                tasks.start_soon(broker, second, up)
            async with Client(address) as bus:
                records, _, _ = await bus.fetch(0)
            tasks.cancel_scope.cancel()
    assert len(done) == agents * calls_each
    found: list[Span] = [span for record in records for span in s.decode_spans(record.body)]
    assert len(found) == len({span.span_id for span in found}) == agents * calls_each


@pytest.mark.anyio
async def test_no_agent_waits_longer_for_the_broker_than_its_limit(tmp_path: Path) -> None:
    up, gateway_up = anyio.Event(), anyio.Event()
    at: dict[str, str] = {}

    def note(name: str, event: anyio.Event, address: str) -> None:
        at[name] = address
        event.set()

    with serving(Engine().app()) as upstream:
        section = GatewaySection(bind="127.0.0.1:0", upstreams=[upstream], admission_wait_s=0.3)
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def broker() -> None:
                with scope:
                    section = BrokerSection(bind="tcp://127.0.0.1:*")
                    await serve_broker(section, tmp_path, SECRET, started=partial(note, "bus", up))

            tasks.start_soon(broker)
            await up.wait()
            gateway = partial(serve_gateway, section, bus_address=at["bus"], secret=SECRET)
            tasks.start_soon(partial(gateway, started=partial(note, "gateway", gateway_up)))
            await gateway_up.wait()
            scope.cancel()
            asked: dict[str, Any] = {"model": "policy", "messages": QUESTION}
            async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
                answer = await http.post(at["gateway"] + "/v1/chat/completions", json=asked)
                streamed = await http.post(at["gateway"] + "/v1/chat/completions", json={**asked, "stream": True})
            tasks.cancel_scope.cancel()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert '"error"' in streamed.text and "[DONE]" not in streamed.text
