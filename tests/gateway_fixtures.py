"""What tests of the gateway share: a stub engine that answers as vLLM does, a stub bus, and both behind a real gateway.

Everything is served over real sockets, from threads that end with the test.
"""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anthropic
import anyio
import anyio.to_thread
import httpx
import openai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lightning_bus import tokens
from lightning_bus.config import GatewaySection
from lightning_bus.gateway.app import build_app
from lightning_bus.spans import Span

SECRET = b"s" * 32
PATIENCE_S = 60.0  # with what takes no time, on a machine that stands still for a while
PROMPT_IDS = [1, 2, 3, 4]
RESPONSE_IDS = [7, 8, 9]
LOGPROBS = [-0.5, -0.25, -1.5]
ARGUMENTS = '{"a": 2, "b": 2}'
TOOL_MESSAGE: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}],
}
TOOL_PIECES: list[dict[str, Any]] = [
    {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": ""}},
    {"function": {"arguments": ARGUMENTS[:7]}},
    {"function": {"arguments": ARGUMENTS[7:]}},
]
QUESTION: list[Any] = [{"role": "user", "content": "2 + 2?"}]


@dataclass
class Engine:
    """A stub engine: keeps what it was asked, answers as it is told."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[Response] = field(default_factory=list)  # given first, in turn
    edit: Callable[[dict[str, Any]], None] = lambda body: None
    stream_ends: threading.Event = field(default_factory=threading.Event)  # closed streams set it
    stream_goes_on: threading.Event | None = None  # the stream waits for it after its first token
    stream_breaks: bool = False
    keeps_silent: bool = False  # until who asked is gone
    calls_tool: bool = False  # instead of saying something

    def app(self) -> Starlette:
        async def models(request: Request) -> Response:
            return JSONResponse({"object": "list", "data": [{"id": "policy", "object": "model"}]})

        async def health(request: Request) -> Response:
            return Response()

        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", models),
                Route("/health", health),
            ]
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.refusals:
            return self.refusals.pop(0)
        if self.keeps_silent:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.stream_ends.set()
        if body["stream"]:
            return StreamingResponse(self.chunks(body), media_type="text/event-stream")
        choices = [
            {
                "index": index,
                "message": TOOL_MESSAGE if self.calls_tool else {"role": "assistant", "content": f"answer {index}"},
                "finish_reason": "tool_calls" if self.calls_tool else "stop",
                "token_ids": RESPONSE_IDS,
                "logprobs": {"content": [_token(logprob) for logprob in LOGPROBS]},
                "weight_versions": [{"version": "3", "start": 0, "end": 3}],
            }
            for index in range(body.get("n", 1))
        ]
        answer = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
            "prompt_token_ids": PROMPT_IDS, "choices": choices,
            "usage": {"prompt_tokens": 4, "completion_tokens": 3 * len(choices), "total_tokens": 4 + 3 * len(choices)},
        }  # fmt: skip
        self.edit(answer)
        return JSONResponse(answer)

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        choices = [
            {
                "index": index, "text": f" text {index}", "finish_reason": "stop", "token_ids": RESPONSE_IDS,
                "prompt_token_ids": PROMPT_IDS, "logprobs": {"tokens": ["t"] * 3, "token_logprobs": LOGPROBS},
            }
            for index in range(body.get("n", 1))
        ]  # fmt: skip
        answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices}
        if not body["stream"]:
            usage = {"prompt_tokens": 4, "completion_tokens": 3 * len(choices), "total_tokens": 4 + 3 * len(choices)}
            return JSONResponse({**answer, "usage": usage})
        events = "".join(f"data: {json.dumps({**answer, 'choices': [choice]})}\n\n" for choice in choices)
        return Response(events + "data: [DONE]\n\n", media_type="text/event-stream")

    async def chunks(self, body: dict[str, Any]) -> Any:
        def chunk(choice: dict[str, Any] | None, **more: Any) -> str:
            choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
            shape = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "policy", "choices": choices}
            return f"data: {json.dumps({**shape, **more})}\n\n"

        def token(i: int, **more: Any) -> dict[str, Any]:
            content = {"content": [_token(LOGPROBS[i])]}
            return {"delta": {"content": f"t{i} "}, "token_ids": [RESPONSE_IDS[i]], "logprobs": content, **more}

        try:
            yield chunk({"delta": {"role": "assistant", "content": ""}}, prompt_token_ids=PROMPT_IDS)
            if self.calls_tool:
                for piece in TOOL_PIECES:
                    yield chunk({"delta": {"tool_calls": [{"index": 0, **piece}]}})
                yield chunk({**token(0), "delta": {}, "finish_reason": "tool_calls"})
                yield chunk(None, usage={"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5})
                yield "data: [DONE]\n\n"
                return
            yield chunk(token(0))
            if self.stream_goes_on is not None:
                while not self.stream_goes_on.is_set():
                    await anyio.sleep(0.005)
                    yield ": still here\n\n"
            yield chunk(token(1))
            if self.stream_breaks:
                return
            yield chunk(token(2, finish_reason="stop", weight_versions=[{"version": "3", "start": 0, "end": 3}]))
            yield chunk(None, usage={"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7})
            yield "data: [DONE]\n\n"
        finally:
            self.stream_ends.set()


def _token(logprob: float) -> dict[str, Any]:
    return {"token": "t", "logprob": logprob, "bytes": [116], "top_logprobs": []}


@dataclass
class Bus:
    """A stub bus: keeps spans, or raises what it is told to."""

    appended: list[tuple[str, int, list[Span]]] = field(default_factory=list)
    error: Exception | None = None
    appending: threading.Event = field(default_factory=threading.Event)
    may_append: threading.Event | None = None

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        self.appending.set()
        if self.may_append is not None:
            await anyio.to_thread.run_sync(self.may_append.wait)
        if self.error is not None:
            raise self.error
        self.appended.append((rollout_id, attempt, list(spans)))

    async def status(self) -> object:
        if self.error is not None:
            raise self.error
        return None

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for _, _, spans in self.appended for span in spans)


@contextmanager
def serving(app: Starlette, listener: socket.socket | None = None) -> Iterator[str]:
    """Serve `app` in a thread; yields its URL."""
    listener = listener or free_listener()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def until(condition: Callable[[], bool]) -> None:
    """Return when the condition is true; what makes it so runs in other threads."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, "nothing happened"
        time.sleep(0.005)


get, post = (functools.partial(ask, timeout=PATIENCE_S) for ask in (httpx.get, httpx.post))


def closed_port() -> socket.socket:
    """A socket at whose port nobody listens. As long as it is open, no other process gets that port."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


def free_listener() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)  # from now on connecting succeeds, whenever the server is ready to accept
    return listener


@dataclass
class World:
    engine: Engine
    bus: Bus
    url: str
    engine_url: str

    def client(self, claims: tokens.Claims | None = None, **options: Any) -> openai.OpenAI:
        claims = claims or tokens.Claims("r-1", 2)
        base_url = f"{self.url}/rollout/{claims.rollout_id}/attempt/{claims.attempt}/v1"
        client = openai.OpenAI(base_url=base_url, api_key=tokens.mint(SECRET, claims), **{"max_retries": 0, **options})
        self.closing.callback(client.close)
        return client

    def anthropic(self, claims: tokens.Claims | None = None, **options: Any) -> anthropic.Anthropic:
        claims = claims or tokens.Claims("r-1", 2)
        base_url = f"{self.url}/rollout/{claims.rollout_id}/attempt/{claims.attempt}"
        options = {"api_key": tokens.mint(SECRET, claims), "max_retries": 0, **options}
        client = anthropic.Anthropic(base_url=base_url, **options)
        self.closing.callback(client.close)
        return client

    closing: ExitStack = field(default_factory=ExitStack)


@contextmanager
def open_world(**section: Any) -> Iterator[World]:
    """Serve a stub engine, a stub bus and a gateway between them; `section` is laid over the test's [gateway]."""
    engine, bus = Engine(), Bus()
    with ExitStack() as stack:
        upstream = stack.enter_context(serving(engine.app()))
        limits = {"admission_wait_s": PATIENCE_S, "request_limit_s": PATIENCE_S, "body_bytes_max": 10_000, **section}
        app = build_app(bus, section=GatewaySection(upstreams=[upstream], **limits), secret=SECRET)
        world = World(engine, bus, stack.enter_context(serving(app)), upstream)
        stack.push(world.closing)
        yield world
