"""Answers that come in pieces: passed through as they come, recorded complete, their end held back until it is durable."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import anyio
import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_bus.clock import wall_ns
from lightning_bus.errors import BrokenError
from lightning_bus.gateway import recording
from lightning_bus.gateway.recording import Call, Json, StreamRecord
from lightning_bus.gateway.refusals import error_body
from lightning_bus.gateway.upstream import Answer, learn_version
from lightning_bus.spans import Span

Record = Callable[[list[Span], Call], Awaitable[Response | None]]  # Gateway.record

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Relay(Response):
    """A stream on its way through: chunk by chunk, except that the end waits until the span is durable."""

    def __init__(self, record: Record, answer: Answer, call: Call, asked: Json) -> None:
        super().__init__()
        self._make_durable = record
        self._answer = answer
        self._call = call
        self._asked = asked
        self._record = StreamRecord()
        self._first_token_ns = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end: tuple[list[bytes], str] | None = None

        async def relay() -> None:
            nonlocal end
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            end = await self._pass_on(send)
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel_when_gone, receive, tasks.cancel_scope)
                tasks.start_soon(relay)
        finally:
            await self._answer.close()  # if the agent hung up, this is what tells the engine to stop
        held, broke = end or ([], WENT_AWAY)
        spans = recording.model_call_spans(
            self._call,
            self._record.response(),
            wall_ns(),
            span_id,
            first_token_ns=self._first_token_ns,
            interrupted=broke,
        )
        learn_version(self._answer, spans)
        refusal = await self._make_durable(spans, self._call)
        if end is None:
            return
        if refusal is not None:
            held = [b"data: " + bytes(refusal.body) + b"\n\n"]
        elif not broke:
            held.append(b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"".join(held)})

    async def _pass_on(self, send: Send) -> tuple[list[bytes], str]:
        """Relay what may leave at once. Returns the events held back, and why the stream is not whole if it is not."""
        held: list[bytes] = []
        options = cast(Json, self._asked.get("stream_options") or {})
        wants_usage = bool(options.get("include_usage"))
        try:
            async for chunk in _events(self._answer):
                if "error" in chunk:
                    return [*held, _event(chunk)], f"the engine broke off: {chunk['error']}"
                self._record.add(chunk)
                if self._record.choices and not self._first_token_ns:
                    self._first_token_ns = wall_ns()
                choices: list[Json] = chunk.get("choices") or []
                if not choices and not wants_usage:
                    continue
                data = _event(recording.as_asked(chunk, self._asked))
                if not choices or any(choice.get("finish_reason") for choice in choices):
                    held.append(data)
                else:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except BrokenError as exc:
            return [*held, _event(error_body(str(exc), "server_error", None))], "the engine broke off"
        if not self._record.finished:
            message = f"engine {self._answer.engine.url} ended its stream before the answer was finished"
            return [*held, _event(error_body(message, "server_error", None))], "the engine broke off"
        return held, ""


WENT_AWAY = "client went away"
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def _events(answer: Answer) -> AsyncIterator[Json]:
    """The JSON objects of a server-sent stream, up to [DONE]. Raises BrokenError when one cannot be read."""
    rest = b""
    while (part := await answer.chunk()) is not None:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue
            if data.strip() == b"[DONE]":
                return
            try:
                chunk = _decode(data)
            except msgspec.DecodeError as exc:
                raise BrokenError(f"engine {answer.engine.url} streamed what is not JSON: {data[:200]!r}") from exc
            if isinstance(chunk, dict):
                yield cast(Json, chunk)


def _event(body: Json) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


async def cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def span_id() -> bytes:
    """Return a new span's id."""
    return os.urandom(8)
