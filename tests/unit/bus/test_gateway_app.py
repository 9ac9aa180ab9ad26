"""The gateway between the official `openai` client and an engine, over real sockets.

The engine is a stub that answers as vLLM does; the bus is a stub that keeps spans in a list and can refuse them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import numpy as np
import openai
import pytest
from starlette.responses import JSONResponse, Response

from lightning_bus import spans as s
from lightning_bus import tokens
from lightning_bus.broker.server import serve_broker
from lightning_bus.client import Client
from lightning_bus.config import BrokerSection, GatewaySection
from lightning_bus.errors import BrokenError, CallError, FencedError
from lightning_bus.gateway.app import build_app
from lightning_bus.gateway.daemon import serve_gateway
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.spans import model_call
from tests.gateway_fixtures import (
    LOGPROBS,
    PATIENCE_S,
    PROMPT_IDS,
    QUESTION,
    RESPONSE_IDS,
    SECRET,
    Bus,
    Engine,
    World,
    closed_port,
    free_listener,
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


def test_a_call_is_recorded_exactly_and_the_agent_sees_what_it_asked_for(world: World) -> None:
    completion = world.client().chat.completions.create(
        model="policy", messages=QUESTION, max_tokens=48, temperature=0.5
    )

    assert completion.choices[0].message.content == "answer 0"
    assert completion.choices[0].logprobs is None
    assert not {"prompt_token_ids", "token_ids", "weight_versions"} & set(json.loads(completion.to_json()))
    assert "token_ids" not in completion.choices[0].to_dict()

    [(rollout_id, attempt, [span])] = world.bus.appended
    call = model_call(span)
    assert (rollout_id, attempt, span.rollout_id, span.attempt) == ("r-1", 2, "r-1", 2)
    assert (span.trace_id, span.parent_id) == root_of_attempt("r-1", 2)
    assert call.untrainable == ""
    assert call.prompt_ids_P.tolist() == PROMPT_IDS
    assert call.response_ids_R.tolist() == RESPONSE_IDS
    assert call.logprobs_R.tolist() == np.float32(LOGPROBS).tolist()
    assert call.weight_versions == [("3", 0, 3)]
    assert call.temperature == 0.5
    expected = {
        s.OPERATION: "chat", s.REQUEST_MODEL: "policy", s.TEMPERATURE: 0.5, s.TOP_P: 1.0, s.MAX_TOKENS: 48,
        s.INPUT_TOKENS: 4, s.OUTPUT_TOKENS: 3, s.FINISH_REASONS: ["stop"],
    }  # fmt: skip
    assert expected.items() <= {k: v for k, v in span.attributes.items() if k in expected}.items()
    assert json.loads(span.attributes[s.RESPONSE_BODY]) == {"role": "assistant", "content": "answer 0"}
    assert json.loads(span.attributes[s.REQUEST_BODY]) == world.engine.requests[0]
    assert span.start_ns < span.end_ns


def test_the_engine_is_asked_for_ids_log_probs_and_an_explicit_distribution(world: World) -> None:
    client = world.client()
    client.chat.completions.create(model="policy", messages=QUESTION)
    client.chat.completions.create(model="policy", messages=QUESTION)
    client.chat.completions.create(model="policy", messages=QUESTION, extra_body={"cache_salt": "mine"})

    first, second, third = world.engine.requests
    assert (first["return_token_ids"], first["logprobs"], first["temperature"], first["top_p"]) == (
        True,
        True,
        1.0,
        1.0,
    )
    assert "cache_salt" not in first  # nothing is known of the engine's weights yet
    assert second["cache_salt"] == "3"
    assert third["cache_salt"] == "3 mine", "an agent's own salt knows nothing of weights"


def test_what_the_agent_asked_for_is_not_taken_away(world: World) -> None:
    completion = world.client().chat.completions.create(
        model="policy", messages=QUESTION, logprobs=True, extra_body={"return_token_ids": True}
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.logprob for token in logprobs.content] == LOGPROBS
    assert completion.to_dict()["prompt_token_ids"] == PROMPT_IDS


def test_each_choice_is_a_span_of_its_own(world: World) -> None:
    completion = world.client().chat.completions.create(model="policy", messages=QUESTION, n=3)
    assert len(completion.choices) == 3
    [(_, _, spans)] = world.bus.appended
    assert [json.loads(span.attributes[s.RESPONSE_BODY])["content"] for span in spans] == [
        "answer 0",
        "answer 1",
        "answer 2",
    ]
    assert len({span.span_id for span in spans}) == 3
    assert all(model_call(span).untrainable == "" for span in spans)


def test_the_rollouts_model_and_overrides_win(world: World) -> None:
    claims = tokens.Claims("r-1", 1, model="teacher", overrides={"temperature": 0.25, "seed": 7})
    world.client(claims).chat.completions.create(model="gpt-4o", messages=QUESTION, temperature=1.0)
    assert (world.engine.requests[0]["model"], world.engine.requests[0]["seed"]) == ("teacher", 7)
    assert world.bus.spans[0].attributes[s.TEMPERATURE] == 0.25


def test_ids_and_log_probs_that_are_missing_make_a_call_untrainable(world: World) -> None:
    def no_ids(body: dict[str, Any]) -> None:
        del body["choices"][0]["token_ids"]

    def no_logprobs(body: dict[str, Any]) -> None:
        body["choices"][0]["logprobs"] = None

    def swallowed(body: dict[str, Any]) -> None:
        body["usage"]["completion_tokens"] = 5

    for edit in (no_ids, no_logprobs, swallowed):
        world.engine.edit = edit
        world.client().chat.completions.create(model="policy", messages=QUESTION)
    assert [span.attributes[s.UNTRAINABLE] for span in world.bus.spans] == [
        "token ids missing",
        "log-probs missing",
        "token ids missing: the engine counted more tokens than it gave",
    ]


def test_a_stream_passes_through_and_is_recorded_whole(world: World) -> None:
    client = world.client()
    chunks = list(client.chat.completions.create(model="policy", messages=QUESTION, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "t0 t1 t2 "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(not {"token_ids", "prompt_token_ids", "weight_versions"} & set(json.dumps(c.to_dict())) for c in chunks)
    [span] = world.bus.spans
    call = model_call(span)
    assert call.untrainable == ""
    assert (call.prompt_ids_P.tolist(), call.response_ids_R.tolist()) == (PROMPT_IDS, RESPONSE_IDS)
    assert call.logprobs_R.tolist() == np.float32(LOGPROBS).tolist()
    assert call.weight_versions == [("3", 0, 3)]
    assert json.loads(span.attributes[s.RESPONSE_BODY]) == {"role": "assistant", "content": "t0 t1 t2 "}
    assert 0 < span.attributes[s.FIRST_TOKEN_MS] < (span.end_ns - span.start_ns) / 1e6 + 1


def test_the_usage_chunk_is_there_only_for_those_who_asked(world: World) -> None:
    create = world.client().chat.completions.create
    without = list(create(model="policy", messages=QUESTION, stream=True))
    asked = list(create(model="policy", messages=QUESTION, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in without)
    assert asked[-1].usage is not None and asked[-1].usage.completion_tokens == 3


def test_the_end_of_a_stream_waits_for_the_disk_and_its_beginning_does_not(world: World) -> None:
    world.bus.may_append = threading.Event()
    stream = iter(world.client().chat.completions.create(model="policy", messages=QUESTION, stream=True))
    seen = [next(stream), next(stream), next(stream)]
    assert world.bus.appending.wait(PATIENCE_S)
    assert world.bus.appended == [] and all(chunk.choices[0].finish_reason is None for chunk in seen)
    world.bus.may_append.set()
    assert [chunk.choices[0].finish_reason for chunk in stream] == ["stop"]
    assert len(world.bus.spans) == 1


def test_an_agent_that_leaves_a_stream_stops_the_engine_and_leaves_an_untrainable_call(world: World) -> None:
    world.engine.stream_goes_on = threading.Event()
    stream = world.client().chat.completions.create(model="policy", messages=QUESTION, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    assert world.engine.stream_ends.wait(PATIENCE_S)
    until(lambda: bool(world.bus.spans))
    [span] = world.bus.spans
    assert span.attributes[s.UNTRAINABLE] == "client went away"
    assert model_call(span).response_ids_R.tolist() == RESPONSE_IDS[:1]


def test_an_engine_that_breaks_off_a_stream_is_an_error_to_the_agent(world: World) -> None:
    world.engine.stream_breaks = True
    with pytest.raises(openai.APIError, match="before the answer was finished"):
        list(world.client().chat.completions.create(model="policy", messages=QUESTION, stream=True))
    assert world.bus.spans[0].attributes[s.UNTRAINABLE] == "the engine broke off"


def test_an_attempt_that_is_over_is_told_409_once(world: World) -> None:
    world.bus.error = FencedError("rollout r-1 attempt 2 was given to another worker.")
    with pytest.raises(openai.ConflictError, match="attempt is over"):
        world.client(max_retries=5).chat.completions.create(model="policy", messages=QUESTION)
    assert len(world.engine.requests) == 1  # the SDK was told that trying again is in vain
    with pytest.raises(openai.APIError, match="attempt is over"):
        list(world.client().chat.completions.create(model="policy", messages=QUESTION, stream=True))


def test_a_bus_that_is_away_is_told_503_and_the_sdks_retry_is_marked(world: World) -> None:
    world.bus.error = BrokenError("the broker did not answer within 5 s")
    with pytest.raises(openai.InternalServerError, match="did not answer") as caught:
        world.client().chat.completions.create(model="policy", messages=QUESTION)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")

    world.bus.error = None
    world.client().chat.completions.create(
        model="policy", messages=QUESTION, extra_headers={"x-stainless-retry-count": "1"}
    )
    assert world.bus.spans[0].attributes[s.RETRY_COUNT] == 1


@pytest.mark.parametrize(
    ("claims", "secret"),
    [
        (tokens.Claims("r-1", 1), SECRET),
        (tokens.Claims("r-9", 2), SECRET),
        (tokens.Claims("r-1", 2), b"x" * 32),
    ],
)
def test_a_key_opens_only_its_own_attempt(world: World, claims: tokens.Claims, secret: bytes) -> None:
    client = world.client().with_options(api_key=tokens.mint(secret, claims))
    with pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model="policy", messages=QUESTION)
    assert caught.value.code == "invalid_api_key"
    assert world.engine.requests == []


def test_calls_without_a_rollout_are_recorded_under_none(world: World) -> None:
    client = world.client().with_options(base_url=f"{world.url}/v1", api_key="anything")
    client.chat.completions.create(model="policy", messages=QUESTION)
    assert [(rollout_id, attempt) for rollout_id, attempt, _ in world.bus.appended] == [("", 0)]
    assert [model.id for model in client.models.list()] == ["policy"]


def test_a_parent_span_of_the_agents_own_is_kept(world: World) -> None:
    header = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    world.client().chat.completions.create(model="policy", messages=QUESTION, extra_headers=header)
    assert (world.bus.spans[0].trace_id, world.bus.spans[0].parent_id) == (b"\xab" * 16, b"\xcd" * 8)


def test_bad_requests_are_refused_in_openais_shape(world: World) -> None:
    url = f"{world.url}/rollout/r-1/attempt/2/v1/chat/completions"
    key = {"authorization": f"Bearer {tokens.mint(SECRET, tokens.Claims('r-1', 2))}"}
    json_type = {**key, "content-type": "application/json"}
    answers = [
        post(url, headers=json_type, content=b"{"),
        post(url, headers=json_type, content=b"[1]"),
        post(url, headers={**key, "content-type": "text/plain"}, content=b"{}"),
        post(url, headers=json_type, content=b'"' + b"x" * 20_000 + b'"'),
        post(url, headers=json_type, content=iter([b"x" * 9_000, b"x" * 9_000])),
        get(url, headers=key),
        post(f"{world.url}/v1/nothing", headers=key),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 415, 413, 413, 405, 404]
    assert all({"message", "type", "param", "code"} == set(answer.json()["error"]) for answer in answers)
    assert world.engine.requests == []


def test_an_engines_refusal_reaches_the_agent_and_the_log(world: World) -> None:
    error = {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}
    world.engine.refusals = [JSONResponse({"error": error}, 400)]
    with pytest.raises(openai.BadRequestError, match="too long"):
        world.client().chat.completions.create(model="policy", messages=QUESTION)
    [span] = world.bus.spans
    assert span.attributes[s.UNTRAINABLE] == "no answer" and "400" in span.error


def test_an_engine_that_swaps_its_weights_is_only_latency(world: World) -> None:
    world.engine.refusals = [Response("swapping", 503), Response("swapping", 503)]
    world.client().chat.completions.create(model="policy", messages=QUESTION)
    assert len(world.engine.requests) == 3
    assert len(world.bus.spans) == 1


def test_an_engine_that_starts_late_is_only_latency() -> None:
    engine, bus, late = Engine(), Bus(), closed_port()
    section = GatewaySection(upstreams=["http://{}:{}".format(*late.getsockname())], admission_wait_s=PATIENCE_S)
    with serving(build_app(bus, section=section, secret=SECRET)) as url, ExitStack() as stack:
        answers: list[str | None] = []

        def ask() -> None:
            client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
            completion = client.chat.completions.create(model="policy", messages=QUESTION)
            answers.append(completion.choices[0].message.content)

        assert get(f"{url}/health").status_code == 503
        asking = threading.Thread(target=ask)
        asking.start()
        late.listen(8)
        with serving(engine.app(), late):
            asking.join()
            assert get(f"{url}/health").json()["status"] == "ok"
    assert answers == ["answer 0"]


def test_an_engine_that_stays_away_is_told_503_with_the_way_out() -> None:
    nobody = closed_port()
    section = GatewaySection(upstreams=[f"http://127.0.0.1:{nobody.getsockname()[1]}"], admission_wait_s=0.1)
    bus = Bus()
    with nobody, serving(build_app(bus, section=section, secret=SECRET)) as url:
        answer = post(f"{url}/v1/chat/completions", json={"messages": QUESTION})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "admission_wait_s" in answer.json()["error"]["message"]
    assert bus.spans[0].attributes[s.UNTRAINABLE] == "no answer"


def test_an_engine_that_is_too_slow_is_told_504() -> None:
    with open_world(request_limit_s=0.1) as world:
        world.engine.keeps_silent = True
        answer = post(f"{world.url}/v1/chat/completions", json={"messages": QUESTION})
    assert answer.status_code == 504
    assert "request_limit_s" in answer.json()["error"]["message"]


def test_a_skewed_distribution_is_recorded_and_warned_of_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_bus.gateway"):
        for _ in range(2):
            world.client().chat.completions.create(model="policy", messages=QUESTION, top_p=0.5)
    assert [record.message.startswith("an agent samples with top_p=0.5") for record in caplog.records] == [True]
    assert world.bus.spans[0].attributes[s.TOP_P] == 0.5
    assert model_call(world.bus.spans[0]).untrainable == ""


@pytest.mark.anyio
async def test_a_port_in_use_says_so_and_the_way_out() -> None:
    listener = free_listener()
    section = GatewaySection(bind=f"127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(CallError, match=r"is in use by another process\. Stop that one, or change gateway\.bind"):
        await serve_gateway(section, bus_address="tcp://127.0.0.1:1", secret=SECRET)
    listener.close()


@pytest.mark.anyio
async def test_a_call_in_flight_outlives_the_order_to_stop_and_is_in_the_log(tmp_path: Path) -> None:
    engine = Engine(stream_goes_on=threading.Event())
    at: dict[str, str] = {}
    broker_up, gateway_up = anyio.Event(), anyio.Event()

    def note(name: str, event: anyio.Event) -> Callable[[str], None]:
        def started(address: str) -> None:
            at[name] = address
            event.set()

        return started

    stopping = anyio.Event()

    async def run_gateway(upstream: str) -> None:
        section = GatewaySection(bind="127.0.0.1:0", upstreams=[upstream])
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def stop() -> None:
                    await stopping.wait()
                    scope.cancel()

                tasks.start_soon(stop)
                await serve_gateway(section, bus_address=at["bus"], secret=SECRET, started=note("gateway", gateway_up))

    with serving(engine.app()) as upstream:
        async with anyio.create_task_group() as tasks:
            broker = BrokerSection(bind="tcp://127.0.0.1:*")
            tasks.start_soon(partial(serve_broker, broker, tmp_path, SECRET, started=note("bus", broker_up)))
            await broker_up.wait()
            tasks.start_soon(run_gateway, upstream)
            await gateway_up.wait()
            request = {"model": "policy", "messages": QUESTION, "stream": True}
            async with (
                Client(at["bus"]) as bus,
                httpx.AsyncClient(timeout=PATIENCE_S) as http,
                http.stream("POST", at["gateway"] + "/v1/chat/completions", json=request) as answer,
            ):
                lines = answer.aiter_lines()
                await anext(lines)
                stopping.set()
                engine.stream_goes_on.set()
                rest = [line async for line in lines]
                [record], _, _ = await bus.fetch(0)
            tasks.cancel_scope.cancel()
    assert rest[-2:] == ["data: [DONE]", ""]
    [span] = s.decode_spans(record.body)
    assert model_call(span).untrainable == ""
