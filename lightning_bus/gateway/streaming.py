"""Answers that come in pieces: passed through as they come, recorded complete, their end held back until it is durable.

Whatever the agent's dialect, the events are made chunk by chunk from the engine's, so the agent reads a token when the
engine has sampled it. From the first chunk that says why the answer ended, everything waits for the span.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, cast

import anyio
import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_bus.clock import wall_ns
from lightning_bus.errors import BrokenError
from lightning_bus.gateway import recording
from lightning_bus.gateway.dialects import Dialect, Json, dictionary, dicts, reasoning_of
from lightning_bus.gateway.engines import Answer, Engine
from lightning_bus.gateway.recording import Call, StreamRecord
from lightning_bus.gateway.refusals import error_body
from lightning_bus.gateway.rendering import ABORTED
from lightning_bus.gateway.upstream import learn_version
from lightning_bus.spans import Span

Record = Callable[[list[Span], Call], Awaitable[Response | None]]  # Gateway.record

_decode = msgspec.json.Decoder().decode


class Source(Protocol):
    """Where the chunks of an answer come from."""

    @property
    def engine(self) -> Engine: ...

    def chunks(self) -> AsyncIterator[list[Json]]: ...

    def close(self) -> None: ...


class ChatStream:
    """The chunks of the chat route, as they are."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.engine = answer.engine
        self.close = answer.close
        self.chunks = answer.events


class Relay(Response):
    """A stream on its way through: chunk by chunk, except that the end waits until the span is durable.

    whole  is called with an answer that is complete and durable, before the agent sees its end
    ended  is called when nothing more will happen
    """

    def __init__(
        self, record: Record, source: Source, call: Call, dialect: Dialect, asked: Json, ident: str,
        *, whole: Callable[[Json], None], ended: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__()
        self._make_durable = record
        self._source = source
        self._whole = whole
        self._call = call
        self._dialect = dialect
        self._out = dialect.stream(asked, ident)
        self._ended = ended
        self._record = StreamRecord()
        self._first_token_ns = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._relay(receive, send)
        finally:
            self._ended()

    async def _relay(self, receive: Receive, send: Send) -> None:
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
            self._source.close()  # if the agent hung up, this is what tells the engine to stop
        held, broke = end or ([], WENT_AWAY)
        answer = self._record.response()
        spans = recording.answered_spans(
            self._call, answer, wall_ns(), span_id, first_token_ns=self._first_token_ns, interrupted=broke
        )
        learn_version(self._source.engine, spans)
        refusal = await self._make_durable(spans, self._call)
        if end is None:
            return
        if refusal is not None:
            held = [self._out.failed(dictionary(_decode(refusal.body).get("error")))]
        elif not broke:
            self._whole(answer)
            held.append(self._out.end(answer))
        await send({"type": "http.response.body", "body": b"".join(held)})

    async def _pass_on(self, send: Send) -> tuple[list[bytes], str]:
        """Relay what may leave at once. Returns the events held back, and why the stream is not whole if it is not."""
        held: list[bytes] = []
        ready: list[bytes] = []  # of what came together, so that it leaves together
        why = f"{self._source.engine.name} ended its stream before the answer was finished"
        try:
            async for chunks in self._source.chunks():
                for chunk in chunks:
                    if "error" in chunk:
                        error = chunk["error"]
                        return [*ready, *held, self._out.failed(_error(error))], f"the engine broke off: {error}"
                    if any(choice.get("finish_reason") == ABORTED for choice in dicts(chunk.get("choices"))):
                        raise BrokenError(f"{self._source.engine.name} was paused in the middle of its answer")
                    (held if self._take(chunk) else ready).append(self._out.push(chunk))
                data = b"".join(ready)
                ready.clear()
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except BrokenError as exc:
            why = str(exc)
        except (TypeError, ValueError, KeyError, AttributeError) as exc:
            why = f"{self._source.engine.name} streamed what makes no sense ({type(exc).__name__}: {exc})"
        else:
            if self._record.finished:
                return held, ""
        failed = self._out.failed(error_body(why, "server_error", None)["error"])
        return [*ready, *held, failed], "the engine broke off"

    def _take(self, chunk: Json) -> bool:
        """Record a chunk. True when what it says must wait until the call is durable: that the answer is at its end."""
        seen = self._dialect.as_chat(chunk)
        self._record.add(seen)
        choices = dicts(seen.get("choices"))
        if not self._first_token_ns and any(_says_something(choice) for choice in choices):
            self._first_token_ns = wall_ns()
        return not choices or any(choice.get("finish_reason") for choice in choices)


def _says_something(choice: Json) -> bool:
    """True unless the chunk only opens the answer, as the first of a stream does."""
    delta = dictionary(choice.get("delta"))
    return bool(choice.get("token_ids") or delta.get("content") or delta.get("tool_calls") or reasoning_of(delta))


def _error(error: object) -> Json:
    return cast(Json, error) if isinstance(error, dict) else error_body(str(error), "server_error", None)["error"]


WENT_AWAY = "client went away"
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def span_id() -> bytes:
    """Return a new span's id."""
    return os.urandom(8)
