"""One engine behind the gateway: its connections, what is known of it, and how it is asked.

What always holds: an engine is ready only once a probe has found it so, and only as long as a connection to it has
stayed open since. A process that was started again holds none of our connections, so nothing is sent to an engine
that was down, or is new and may still have no weights, before it has been asked how it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import anyio
import msgspec

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError, ConfigError
from lightning_bus.gateway.dialects import Json, dicts
from lightning_bus.gateway.http_client import Address, Connection, Gone

CONNECT_LIMIT_S = 5.0
PROBE_LIMIT_S = 2.0
PROOF_S = 0.5  # of a probe, whatever becomes of the connections: no engine starts again in less
DRAIN_S = 0.1  # for what an engine sends after [DONE]

HEALTH, WEIGHT_INFO, MODELS = "/health", "/weight_info", "/v1/models"
_NO_SUCH_ROUTE = (403, 404, 405, 501)
_ROUTES_MAX = 1000  # models whose routes are known of one engine; agents choose these names

_decode = msgspec.json.Decoder().decode
_log = logging.getLogger("lightning_bus.gateway")


@dataclass(slots=True, eq=False)
class Engine:
    """One engine, as the gateway knows it."""

    url: str
    name: str  # what agents may know of it: "engine 1"
    address: Address
    idle: list[Connection] = field(default_factory=list[Connection])
    connections: int = 0
    in_flight: int = 0
    down_until_s: float = 0.0
    unwell: str = "not asked yet"  # what the last probe found; empty: nothing
    version: str = ""  # of its weights, as a probe or an answer last said; salts the prefix cache
    models: frozenset[str] = frozenset()  # that it serves; empty: not known
    token_routes: dict[str, bool] = field(default_factory=dict[str, bool])  # by model: has render, generate, derender
    _proven_s: float = -math.inf
    _lost_s: float = -math.inf  # when its last connection went
    _probing: anyio.Event | None = None

    def is_ready(self, now_s: float) -> bool:
        """True when a probe found it ready and it has been there ever since."""
        return self._proven_s > min(self._lost_s, now_s - PROOF_S)

    def doubt(self) -> None:
        """Ask it how it is before anything else is sent to it."""
        self._proven_s = -math.inf
        self.token_routes.clear()

    def learn_route(self, model: str, known: bool) -> None:
        """Remember whether it renders, generates and derenders for this model, until it is down."""
        if len(self.token_routes) >= _ROUTES_MAX:
            self.token_routes.clear()
        self.token_routes[model] = known

    async def probe(self) -> None:
        """Ask it how it is: health, weights, models. Who comes while another asks waits for that answer."""
        if self._probing is not None:
            await self._probing.wait()
            return
        self._probing = anyio.Event()
        try:
            await self._probe()
        finally:
            self._probing.set()
            self._probing = None

    async def _probe(self) -> None:
        answers: dict[str, Answer] = {}
        failures: list[str] = []

        async def get(target: str) -> None:
            try:
                answers[target] = await self.ask("GET", target, limit_s=PROBE_LIMIT_S)
            except (Gone, BrokenError) as exc:
                failures.append(str(exc))

        with anyio.move_on_after(PROBE_LIMIT_S) as scope:
            async with anyio.create_task_group() as tasks:
                for target in (HEALTH, WEIGHT_INFO, MODELS):
                    tasks.start_soon(get, target)
        if scope.cancelled_caught:
            # It may only be busy. Whoever has no other engine still asks it, if it was ready.
            self._found(f"silent for {PROBE_LIMIT_S:g} s", ready=self.is_ready(monotonic_s()))
            return
        unwell = failures[0] if failures else _unwell(answers)
        if not unwell:
            self.version = _label(answers[WEIGHT_INFO]) or self.version
            self.models = _models(answers[MODELS]) or self.models
            self._proven_s = monotonic_s()
        self._found(unwell, ready=not unwell)

    def _found(self, unwell: str, *, ready: bool) -> None:
        if bool(unwell) != bool(self.unwell) or (unwell and not self.unwell):
            _log.log(
                logging.WARNING if unwell else logging.INFO,
                "%s (%s) %s", self.name, self.url, f"is unwell: {unwell}" if unwell else "is well",
            )  # fmt: skip
        self.unwell = unwell
        if not unwell:
            self.down_until_s = 0.0
        if not ready:
            self.doubt()
            self.version = ""

    async def ask(self, method: str, target: str, body: bytes = b"", *, limit_s: float, stream: bool = False) -> Answer:
        """Ask once. Raises Gone when it cannot be reached or breaks off, BrokenError when it is too slow."""
        head = self.address.head(method, target, body)
        self.in_flight += 1
        answer: Answer | None = None
        connection: Connection | None = None
        try:
            while True:
                connection, used = await self._connection()
                connection.give(limit_s)
                try:
                    await connection.request(head, body)
                    break
                except Gone as exc:
                    connection.close()
                    if connection.late:
                        raise too_slow(self, limit_s) from exc
                    # A kept connection may have been closed by the engine a moment ago, which says nothing of
                    # the engine. A new one tells.
                    if not used:
                        raise
            answer = _answer(self, connection, limit_s)
            if stream and answer.status == 200:
                return answer
            try:
                answer.body = await _whole(connection)
            except Gone as exc:
                if connection.late:
                    raise too_slow(self, limit_s) from exc
                raise
            finally:
                answer.close()
            return answer
        finally:
            if answer is None:
                self.in_flight -= 1
                if connection is not None:  # cancelled while waiting, at the latest: this is what tells the engine
                    connection.close()

    async def _connection(self) -> tuple[Connection, bool]:
        """Return a connection, and whether it has been used before."""
        while self.idle:
            connection = self.idle.pop()  # the newest: the others may grow old and be closed
            if connection.reusable:
                return connection, True
            connection.close()
        return await self.address.connect(CONNECT_LIMIT_S, self), False

    # -- what its connections tell

    def connected(self) -> None:
        self.connections += 1

    def disconnected(self, *, announced: bool) -> None:
        """A connection is gone; announced: the engine had said that it closes it after the answer."""
        self.connections -= 1
        if not self.connections and not announced:
            self._lost_s = monotonic_s()
            self.token_routes.clear()


@dataclass(slots=True, eq=False)
class Answer:
    """An engine's answer. `body` is complete unless the call asked for a stream, which `chunk()` then reads."""

    engine: Engine
    status: int
    content_type: str
    body: bytes
    retry_after_s: float
    limit_s: float
    connection: Connection | None
    asked: int = 1  # how many times an engine was, until this answer

    @property
    def is_late(self) -> bool:
        """True once the time of the call is up."""
        return self.connection is not None and self.connection.late

    async def chunk(self) -> bytes:
        """Return the next bytes of a stream, as they come; b"" at its end.

        Raises BrokenError when the engine breaks off or the time of the call is up.
        """
        if self.connection is None:
            return b""
        try:
            return await self.connection.read()
        except Gone as exc:
            if self.connection.late:
                raise too_slow(self.engine, self.limit_s) from exc
            self.engine.doubt()
            raise BrokenError(f"{self.engine.name} broke off in the middle of its answer ({exc})") from exc

    async def events(self) -> AsyncIterator[list[Json]]:
        """The JSON objects of a server-sent stream up to [DONE], as many at a time as came together.

        Raises BrokenError when one cannot be read.
        """
        rest = b""
        while part := await self.chunk():
            *lines, rest = (rest + part).split(b"\n")
            chunks: list[Json] = []
            done = False
            for line in lines:
                name, _, data = line.strip().partition(b":")
                if name != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    done = True
                    break
                try:
                    chunk = _decode(data)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                    yield chunks
                    raise BrokenError(f"{self.engine.name} streamed what is not JSON: {data[:200]!r}") from exc
                if isinstance(chunk, dict):
                    chunks.append(cast(Json, chunk))
            if chunks:
                yield chunks
            if done:
                await self._drain()
                return

    async def _drain(self) -> None:
        """Read what follows the last event of a stream, so that the connection can be kept."""
        with anyio.move_on_after(DRAIN_S), suppress(BrokenError):
            while await self.chunk():
                pass

    def close(self) -> None:
        """Give the connection back; one whose answer was not read to its end is closed, which cancels the call."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        connection.done()
        self.engine.in_flight -= 1
        if connection.reusable:
            self.engine.idle.append(connection)
        else:
            connection.close()


def engine_at(url: str, name: str) -> Engine:
    """Return an engine that nothing is known of yet. Raises ConfigError for what is no address."""
    try:
        return Engine(url, name, Address(url))
    except ValueError as exc:
        raise ConfigError(
            f"gateway.upstreams: {url!r} is not an address. Write it like http://127.0.0.1:4752."
        ) from exc


def object_of(raw: bytes) -> Json | None:
    """Return a JSON object, or None for what is none."""
    try:
        value = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return cast(Json, value) if isinstance(value, dict) else None


def too_slow(engine: Engine, limit_s: float) -> BrokenError:
    return BrokenError(
        f"{engine.name} did not finish the call within {limit_s:g} s. Ask for fewer tokens, or raise [gateway] request_limit_s."
    )


def _unwell(answers: dict[str, Answer]) -> str:
    """Why an engine with these answers is not ready; empty when it is. A route that it does not have says nothing."""
    for target in (HEALTH, WEIGHT_INFO):
        if answers[target].status != 200 and answers[target].status not in _NO_SUCH_ROUTE:
            return f"answered {answers[target].status} to {target}"
    label = _label(answers[WEIGHT_INFO])
    if label is None or label.isdecimal():
        return ""
    if label == "unfit":
        return "its weights are unfit (an update of them failed); it is to be restarted"
    return (
        f"its weights have no version yet (/weight_info says {label[:40]!r}). A run's first push, or "
        "/update_weight_version, gives them one"
    )


def _label(answer: Answer) -> str | None:
    """What the engine calls its weights; None when it has no word for that."""
    label = (object_of(answer.body) or {}).get("weight_version") if answer.status == 200 else None
    return None if label is None else str(label)


def _models(answer: Answer) -> frozenset[str]:
    listed = dicts((object_of(answer.body) or {}).get("data")) if answer.status == 200 else []
    return frozenset(str(model["id"]) for model in listed if "id" in model)


async def _whole(connection: Connection) -> bytes:
    parts: list[bytes] = []
    while part := await connection.read():
        parts.append(part)
    return b"".join(parts)


def _answer(engine: Engine, connection: Connection, limit_s: float) -> Answer:
    headers = connection.headers
    retry_after = headers.get(b"retry-after", b"0").decode("latin-1")
    return Answer(
        engine=engine,
        status=connection.status,
        content_type=headers.get(b"content-type", b"application/json").decode("latin-1"),
        body=b"",
        retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0,
        limit_s=limit_s,
        connection=connection,
    )
