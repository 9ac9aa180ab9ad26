"""OTLP/HTTP at the gateway: what is taken, what is refused, and how it is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue
from starlette.applications import Starlette

from lightning_bus import spans as s
from lightning_bus.errors import BrokenError, FencedError, LightningBusError, MessageTooLarge
from lightning_bus.otel import ingest
from lightning_bus.otel import names as n
from lightning_bus.otel.ingest import CHUNK, PROTOBUF, Ingest
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.spans import Span, encode_spans
from lightning_bus.tokens import Claims, mint
from tests.bus_fixtures import SECRET, span

pytestmark = pytest.mark.anyio
TOKEN = mint(SECRET, Claims("r-1", 2))
OTHER = mint(SECRET, Claims("r-2", 1))


class Log:
    """A bus that keeps spans, or refuses them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.errors: list[LightningBusError] = []
        self.bytes_max = 1 << 30
        self.wait = anyio.Event()
        self.wait.set()

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        await self.wait.wait()
        if self.errors:
            raise self.errors.pop()
        if len(encode_spans(spans)) > self.bytes_max:
            raise MessageTooLarge("too large")
        assert {(span.rollout_id, span.attempt) for span in spans} == {(rollout_id, attempt)}
        self.spans += spans


@asynccontextmanager
async def endpoint(
    log: Log, *, open_: bool = False, body_bytes_max: int = 1 << 20, limit_s: float = 60.0
) -> AsyncGenerator[httpx.AsyncClient]:
    taker = Ingest(log.append, secret=SECRET, body_bytes_max=body_bytes_max, open_=open_, limit_s=limit_s)
    transport = httpx.ASGITransport(Starlette(routes=taker.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        yield http


def export(*names: str, resource: dict[str, Any] | None = None, **attributes: Any) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    resource_spans = request.resource_spans.add()
    for key, value in (resource or {}).items():
        resource_spans.resource.attributes.add(key=key, value=any_value(value))
    spans = resource_spans.scope_spans.add()
    spans.scope.name = "framework"
    for at, name in enumerate(names, 1):
        made = spans.spans.add(
            name=name, trace_id=b"t" * 16, span_id=at.to_bytes(8, "big"), start_time_unix_nano=10, end_time_unix_nano=20
        )
        for key, value in attributes.items():
            made.attributes.add(key=key, value=any_value(value))
    return request


def any_value(value: Any) -> AnyValue:
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[any_value(item) for item in value]))
    return AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=value) if isinstance(value, str) else AnyValue(double_value=value)  # fmt: skip


async def send(
    http: httpx.AsyncClient, request: ExportTraceServiceRequest, token: str = TOKEN, path: str = "/v1/traces"
) -> tuple[int, str]:
    """Return how many spans were rejected, and why."""
    headers = {"content-type": PROTOBUF, **({"authorization": f"Bearer {token}"} if token else {})}
    answer = await http.post(path, content=request.SerializeToString(), headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, PROTOBUF), answer.content
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    return partial.rejected_spans, partial.error_message


async def test_a_token_is_enough_to_say_whose_spans_they_are() -> None:
    log = Log()
    async with endpoint(log) as http:
        assert await send(
            http, export("step", resource={"service.name": "agent", "telemetry.sdk.name": "x"}, query="q")
        ) == (0, "")
    (got,) = log.spans
    assert (got.rollout_id, got.attempt, got.name, got.start_ns, got.end_ns) == ("r-1", 2, "step", 10, 20)
    assert got.attributes == {"query": "q", n.SCOPE: "framework", n.RESOURCE: {"service.name": "agent"}}
    assert got.parent_id == root_of_attempt("r-1", 2)[1]


@pytest.mark.parametrize("prefix", ["lightning.", "agentlightning."])
async def test_rollout_and_attempt_come_from_resource_or_span(prefix: str) -> None:
    number = "attempt" if prefix == "lightning." else "attempt_id"
    log = Log()
    whose = {f"{prefix}rollout_id": "r-1", f"{prefix}{number}": "2"}
    async with endpoint(log) as http:
        assert await send(http, export("a", resource=whose)) == (0, "")
        assert (await send(http, export("b", resource={f"{prefix}rollout_id": "r-9"})))[0] == 1
        log.spans.clear()
        again = export("c", resource={f"{prefix}rollout_id": "r-9"}, **whose)
        again.resource_spans[0].scope_spans[0].spans[0].span_id = b"another!"
        assert await send(http, again) == (0, "")
    assert [got.name for got in log.spans] == ["c"]
    assert not {n.ROLLOUT_ID, n.ATTEMPT} & log.spans[0].attributes.keys()


async def test_a_collector_sends_for_many_with_a_token_on_each_resource() -> None:
    log = Log()
    one, two = export("a", resource={n.TOKEN: TOKEN}), export("b", resource={n.TOKEN: OTHER})
    one.resource_spans.extend(two.resource_spans)
    async with endpoint(log) as http:
        assert await send(http, one, token="") == (0, "")
    assert {(got.name, got.rollout_id) for got in log.spans} == {("a", "r-1"), ("b", "r-2")}
    assert TOKEN not in repr(log.spans)


@pytest.mark.parametrize(
    ("token", "resource", "path", "why"),
    [
        ("", {}, "/v1/traces", "no token was sent"),
        ("!", {}, "/v1/traces", "not a lightning-bus token"),
        (mint(b"x" * 32, Claims("r-1", 2)), {}, "/v1/traces", "the token's signature does not match"),
        (
            TOKEN,
            {n.ROLLOUT_ID: "r-2"},
            "/v1/traces",
            "the token is for rollout r-1 attempt 2, the span for rollout r-2",
        ),
        (TOKEN, {n.ATTEMPT: 3}, "/v1/traces", "the span for rollout r-1 attempt 3"),
        (TOKEN, {n.ATTEMPT: "at-1f"}, "/v1/traces", "a number from 1 on is wanted"),
        (TOKEN, {}, "/rollout/r-1/attempt/1/v1/traces", "the span for rollout r-1 attempt 1"),
    ],
)
async def test_what_may_not_be_written_is_refused_with_the_reason(
    token: str, resource: dict[str, Any], path: str, why: str
) -> None:
    log = Log()
    async with endpoint(log, open_=bool(resource)) as http:
        rejected, message = await send(http, export("a", "b", resource=resource), token, path)
    assert rejected == 2
    assert why in message
    assert not log.spans


async def test_on_loopback_spans_of_no_rollout_need_no_token() -> None:
    log = Log()
    async with endpoint(log, open_=True) as http:
        assert await send(http, export("a"), token="") == (0, "")
        assert (await send(http, export("b", resource={n.ROLLOUT_ID: "r-1"}), token=""))[0] == 1
    assert [(got.rollout_id, got.attempt, got.parent_id) for got in log.spans] == [("", 0, None)]


async def test_the_good_are_taken_and_the_bad_are_told() -> None:
    log = Log()
    request = export("good", "bad id", "mine")
    spans = request.resource_spans[0].scope_spans[0].spans
    spans[1].span_id = b"short"
    spans[2].attributes.add(key=n.ROLLOUT_ID, value=any_value("r-7"))
    async with endpoint(log) as http:
        rejected, message = await send(http, request)
    assert rejected == 2
    assert "span id '73686f7274'" in message
    assert "r-7" in message
    assert [got.name for got in log.spans] == ["good"]


async def test_an_attempt_that_is_over_is_a_partial_success() -> None:
    log = Log()
    log.errors = [FencedError("rollout r-1 attempt 2 is over")]
    async with endpoint(log) as http:
        assert await send(http, export("a")) == (1, "rollout r-1 attempt 2 is over.")


async def test_a_bus_that_is_away_means_later_and_what_was_taken_is_not_taken_twice() -> None:
    log = Log()
    request = export("a", resource={n.TOKEN: TOKEN})
    request.resource_spans.extend(export("b", resource={n.TOKEN: OTHER}).resource_spans)
    async with endpoint(log) as http:
        log.errors = [BrokenError("away")]
        answer = await http.post("/v1/traces", content=request.SerializeToString(), headers={"content-type": PROTOBUF})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert Status.FromString(answer.content).message == "away"
        assert await send(http, request, token="") == (0, "")
        assert await send(http, request, token="") == (0, "")
    assert sorted(got.name for got in log.spans) == ["a", "b"]


async def test_an_export_sent_again_while_the_first_is_written_is_recorded_once() -> None:
    log = Log()
    log.wait = anyio.Event()
    async with endpoint(log) as http, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(send, http, export("a", "b"))
        await anyio.wait_all_tasks_blocked()
        log.wait.set()
    assert [got.name for got in log.spans] == ["a", "b"]


async def test_an_export_that_was_told_to_come_back_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus that is away for longer than senders wait: each time they hear so, and nothing is appended twice."""
    log = Log()
    log.wait = anyio.Event()
    headers = {"content-type": PROTOBUF, "authorization": f"Bearer {TOKEN}"}
    async with endpoint(log, limit_s=0.01) as http:
        for _ in range(3):
            late = await http.post("/v1/traces", content=export("a", "b").SerializeToString(), headers=headers)
            assert late.status_code == 503 and b"Send them again" in late.content
        monkeypatch.setattr(ingest, "ON_WAY_BYTES_MAX", 1)
        other = export("other")
        other.resource_spans[0].scope_spans[0].spans[0].span_id = b"another!"
        full = await http.post("/v1/traces", content=other.SerializeToString(), headers=headers)
        assert full.status_code == 503 and b"the limit is 1" in full.content
        log.wait.set()
        await anyio.wait_all_tasks_blocked()
        for request in (export("a", "b"), other):
            answer = late
            while answer.status_code == 503:  # on a busy machine its limit may be too short even now
                answer = await http.post("/v1/traces", content=request.SerializeToString(), headers=headers)
            assert answer.status_code == 200
            assert not ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans
    assert [span.name for span in log.spans] == ["a", "b", "other"]


async def test_a_span_too_large_for_a_message_is_refused_alone() -> None:
    log = Log()
    log.bytes_max = 500
    request = export(*"abcdefgh")
    request.resource_spans[0].scope_spans[0].spans[3].attributes.add(key="x", value=any_value("x" * 600))
    async with endpoint(log) as http:
        assert await send(http, request) == (1, "a span exceeds what one message carries.")
    assert sorted(got.name for got in log.spans) == list("abcefgh")


async def test_json_and_gzip_are_understood() -> None:
    log = Log()
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [
        {"traceId": "0a" * 16, "spanId": "0b" * 8, "name": "agentlightning.annotation", "attributes": [
            {"key": "agentlightning.reward.0.value", "value": {"doubleValue": 0.5}}]},
        {"traceId": "0a" * 16, "spanId": "", "name": "bad"},
    ]}]}]}  # fmt: skip
    headers = {
        "content-type": "application/json; charset=utf-8",
        "content-encoding": "gzip",
        "authorization": f"Bearer {TOKEN}",
    }
    async with endpoint(log) as http:
        answer = await http.post("/v1/traces", content=gzip.compress(json.dumps(body).encode()), headers=headers)
    assert answer.status_code == 200
    assert answer.json()["partialSuccess"]["rejectedSpans"] == "1"
    (got,) = log.spans
    assert (got.name, s.reward_of(got)) == (n.ANNOTATION_SPAN_NAME, 0.5)


@pytest.mark.parametrize(
    ("headers", "body", "status", "why"),
    [
        ({"content-type": "text/plain"}, b"", 415, "The content type is text/plain"),
        ({"content-type": PROTOBUF}, b"\xff\xff\xff", 400, "not an ExportTraceServiceRequest"),
        ({"content-type": "application/json"}, b"[1]", 400, "not an object"),
        ({"content-type": PROTOBUF, "content-encoding": "br"}, b"", 400, "Send gzip, or none"),
        ({"content-type": PROTOBUF, "content-encoding": "gzip"}, b"nonsense", 400, "not gzip"),
        (
            {"content-type": PROTOBUF, "content-encoding": "gzip"},
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            400,
            "breaks off",
        ),
        ({"content-type": PROTOBUF}, b"x" * 5000, 413, "exceeds 1000 bytes"),
        (
            {"content-type": PROTOBUF, "content-encoding": "gzip"},
            gzip.compress(bytes(10**7), mtime=0),
            413,
            "exceeds 1000 bytes",
        ),
        ({"content-type": CHUNK}, b"\xc1", 400, "does not hold spans"),
    ],
)
async def test_what_is_no_export_gets_a_status_with_the_reason(
    headers: dict[str, str], body: bytes, status: int, why: str
) -> None:
    log = Log()
    async with endpoint(log, body_bytes_max=1000) as http:
        answer = await http.post("/v1/traces", content=body, headers=headers)
    assert answer.status_code == status
    told = (
        Status.FromString(answer.content).message
        if answer.headers["content-type"] == PROTOBUF
        else answer.json()["message"]
    )
    assert why in told
    assert not log.spans


async def test_our_own_exporters_chunks_are_taken_under_the_same_rules() -> None:
    log = Log()
    mine, other = span("a", "r-1", 2), span("b", "r-2", 1)
    headers = {"content-type": CHUNK, "authorization": f"Bearer {TOKEN}"}
    async with endpoint(log) as http:
        assert (await http.post("/v1/traces", content=encode_spans([mine]), headers=headers)).json() == {}
        refused = await http.post("/v1/traces", content=encode_spans([other]), headers=headers)
        assert refused.status_code == 403
        assert "the token is for rollout r-1" in refused.json()["message"]
        log.errors = [FencedError("over")]
        assert (
            await http.post("/v1/traces", content=encode_spans([span("c", "r-1", 2)]), headers=headers)
        ).status_code == 409
    assert log.spans == [mine]


async def test_model_calls_of_an_instrumented_client_are_not_taken_for_the_engines() -> None:
    log = Log()
    attributes: dict[str, Any] = {s.OPERATION: "chat", s.REQUEST_MODEL: "policy"}
    async with endpoint(log) as http:
        await send(http, export("chat policy", **attributes))
        ids = {s.PROMPT_IDS: [1, 2], s.RESPONSE_IDS: [3], s.LOGPROBS: [-1.0]}
        with_ids = export("chat policy", **attributes, **ids)
        with_ids.resource_spans[0].scope_spans[0].spans[0].span_id = b"another!"
        await send(http, with_ids)
    seen, call = log.spans
    assert not s.is_model_call(seen)
    assert s.is_model_call(call)
    assert not s.model_call(call).untrainable
