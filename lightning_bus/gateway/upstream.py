"""Where model calls go: the engines behind the gateway, and what happens while one of them is down.

A rollout sticks to one engine (rendezvous hash), so the engine's prefix cache sees a conversation whole; when that
engine is down the next in the rollout's own order answers. A call of no rollout goes to the engine with the fewest
calls. What always holds: a call is repeated only while nothing of its answer has left the gateway, so repeating is
invisible; every wait has a limit; and messages name engines by number, because agents are not to know where they are.

    choose ──► ask ──► answer
       ▲        │ cannot connect, broke off, 503, or another 5xx while there is an engine not yet asked
       └─ wait ─┘ …at most admission_wait_s, then BusyError

Connections are kept in a stack for each engine, and there are as many as there are calls at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import anyio

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError, BusyError, ConfigError
from lightning_bus.gateway.http_client import Address, Connection, Gone
from lightning_bus.spans import WEIGHT_VERSIONS, Span

CONNECT_LIMIT_S = 5.0
PROBE_LIMIT_S = 2.0
DRAIN_S = 0.1  # for what an engine sends after [DONE]
DOWN_S = 0.5  # an engine that failed is passed over this long while another one is up
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 1.0
RETRY_AFTER_S_MAX = 2.0  # an engine may ask for more, but a swap of weights is over sooner than it can know

_log = logging.getLogger("lightning_bus.gateway")


@dataclass(slots=True, eq=False)
class Engine:
    """One engine, as the gateway knows it."""

    url: str
    name: str  # what agents may know of it: "engine 1"
    address: Address
    idle: list[Connection] = field(default_factory=list[Connection])
    in_flight: int = 0
    down_until_s: float = 0.0
    unwell: str = ""  # what the last health check found; empty: nothing
    version: str = ""  # of the weights that last answered; salts the prefix cache


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
                raise _too_slow(self.engine, self.limit_s) from exc
            raise BrokenError(f"{self.engine.name} broke off in the middle of its answer ({exc})") from exc

    async def drain(self) -> None:
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


class Upstreams:
    """The engines behind one gateway."""

    def __init__(self, urls: Sequence[str], *, admission_wait_s: float, request_limit_s: float) -> None:
        if not urls:
            raise ConfigError("gateway.upstreams is empty. Name at least one engine, such as http://127.0.0.1:4752.")
        self.engines = [_engine(url, f"engine {number}") for number, url in enumerate(urls, 1)]
        self._admission_wait_s = admission_wait_s
        self._request_limit_s = request_limit_s

    def engine_of(self, key: str) -> Engine:
        """Return the engine that calls of this rollout go to now."""
        return self._choose(key, ())

    async def call(
        self, key: str, method: str, target: str, body: bytes = b"", *, stream: bool = False, salted: bool = False
    ) -> Answer:
        """Return an engine's answer, whatever its status but 503. Close it when it was asked for as a stream.

        key     the rollout; calls with one key go to one engine, those with none to the least busy
        target  path below the engine's URL, such as "/v1/chat/completions"
        salted  add the weights' version as cache_salt to the body, a JSON object

        Raises BusyError when no engine took the call within admission_wait_s, and BrokenError when one took it and
        did not answer within request_limit_s.
        """
        give_up_s = monotonic_s() + self._admission_wait_s
        backoff_s = BACKOFF_S_MIN
        asked = 0
        failed: list[Engine] = []  # answered this call with a 5xx
        while True:
            engine = self._choose(key, failed)
            wait_s = backoff_s
            asked += 1
            try:
                said = _salted(body, engine.version) if salted and engine.version else body
                answer = await self._ask(engine, method, target, said, stream)
                if answer.status >= 500 and answer.status != 503:
                    failed.append(engine)
                    if self._well(failed):
                        continue
                if answer.status != 503:
                    engine.down_until_s = 0.0
                    answer.asked = asked
                    return answer
                why = f"answered 503 {answer.body[:200].decode(errors='replace')}"
                wait_s = max(backoff_s, min(answer.retry_after_s, RETRY_AFTER_S_MAX))
            except Gone as exc:
                why = str(exc)
            now_s = monotonic_s()
            if not engine.down_until_s:
                _log.info("%s (%s) is passed over: it %s", engine.name, engine.url, why)
            engine.down_until_s = now_s + DOWN_S
            if self._well(failed):
                continue
            if now_s + wait_s > give_up_s:
                raise BusyError(
                    f"{engine.name} took no call within {self._admission_wait_s:g} s ({why}). It may be restarting; "
                    "try again, or raise [gateway] admission_wait_s."
                )
            await anyio.sleep(wait_s)
            engine.down_until_s = 0.0
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def probe(self) -> dict[str, str]:
        """Ask every engine how it is. Returns, by name, "ok" or why it is not; calls go by it until the next time."""

        async def one(engine: Engine) -> None:
            try:
                with anyio.fail_after(PROBE_LIMIT_S):
                    answer = await self._ask(engine, "GET", "/health", b"", False)
                unwell = "" if answer.status == 200 else f"answered {answer.status}"
            except TimeoutError:
                unwell = f"silent for {PROBE_LIMIT_S:g} s"
            except (Gone, BrokenError) as exc:
                unwell = str(exc)
            if bool(unwell) != bool(engine.unwell):
                _log.warning(
                    "%s (%s) %s", engine.name, engine.url, f"is unwell: {unwell}" if unwell else "is well again"
                )
            engine.unwell = unwell
            if not unwell:
                engine.down_until_s = 0.0

        async with anyio.create_task_group() as tasks:
            for engine in self.engines:
                tasks.start_soon(one, engine)
        return {engine.name: engine.unwell or "ok" for engine in self.engines}

    async def watch(self, every_s: float) -> None:
        """Probe for ever, so that a call need not be the first to find an engine gone."""
        while True:
            await self.probe()
            await anyio.sleep(every_s)

    async def aclose(self) -> None:
        """Close the idle connections."""
        for engine in self.engines:
            while engine.idle:
                engine.idle.pop().close()

    def _choose(self, key: str, failed: Sequence[Engine]) -> Engine:
        """The first engine in the call's order that is well; where none is, the one that may be back first."""
        if len(self.engines) == 1:
            return self.engines[0]
        well = self._well(failed)
        return next((engine for engine in self._ranked(key) if engine in well), self._ranked(key)[0])

    def _well(self, failed: Sequence[Engine]) -> list[Engine]:
        now_s = monotonic_s()
        return [one for one in self.engines if one.down_until_s <= now_s and not one.unwell and one not in failed]

    def _ranked(self, key: str) -> list[Engine]:
        """The engines in this rollout's order: each rollout has its own, and it survives engines coming and going."""
        if not key:
            return sorted(self.engines, key=lambda engine: engine.in_flight)
        return sorted(self.engines, key=lambda e: hashlib.blake2b(f"{e.url} {key}".encode(), digest_size=8).digest())

    async def _ask(self, engine: Engine, method: str, target: str, body: bytes, stream: bool) -> Answer:
        """Ask one engine once. Raises Gone when it cannot be reached or breaks off, BrokenError when it is too slow."""
        head = engine.address.head(method, target, body)
        engine.in_flight += 1
        answer: Answer | None = None
        connection: Connection | None = None
        try:
            while True:
                connection, used = await _connection(engine)
                connection.give(self._request_limit_s)
                try:
                    await connection.request(head, body)
                    break
                except Gone as exc:
                    connection.close()
                    if connection.late:
                        raise _too_slow(engine, self._request_limit_s) from exc
                    # A kept connection may have been closed by the engine a moment ago, which says nothing of
                    # the engine. A new one tells.
                    if not used:
                        raise
            answer = _answer(engine, connection, self._request_limit_s)
            if stream and answer.status == 200:
                return answer
            try:
                answer.body = await _whole(connection)
            except Gone as exc:
                if connection.late:
                    raise _too_slow(engine, self._request_limit_s) from exc
                raise
            finally:
                answer.close()
            return answer
        finally:
            if answer is None:
                engine.in_flight -= 1
                if connection is not None:  # cancelled while waiting, at the latest: this is what tells the engine
                    connection.close()


def _salted(body: bytes, version: str) -> bytes:
    """Keys and values cached under other weights must not be used: vLLM shares its prefix cache by salt."""
    return b'%s,"cache_salt":"%s"}' % (body[:-1], version.encode())


def _engine(url: str, name: str) -> Engine:
    try:
        return Engine(url, name, Address(url))
    except ValueError as exc:
        raise ConfigError(
            f"gateway.upstreams: {url!r} is not an address. Write it like http://127.0.0.1:4752."
        ) from exc


async def _connection(engine: Engine) -> tuple[Connection, bool]:
    """Return a connection to the engine, and whether it has been used before."""
    while engine.idle:
        connection = engine.idle.pop()  # the newest: the others may grow old and be closed
        if connection.reusable:
            return connection, True
        connection.close()
    return await engine.address.connect(CONNECT_LIMIT_S), False


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


def _too_slow(engine: Engine, limit_s: float) -> BrokenError:
    return BrokenError(
        f"{engine.name} did not finish the call within {limit_s:g} s. Ask for fewer tokens, or raise [gateway] request_limit_s."
    )


def learn_version(answer: Answer, spans: Sequence[Span]) -> None:
    """Remember which weights the engine answers with, for the salt of the next call's prefix cache.

    Keys and values computed under old weights would give the new version's name to log-probs that are not its own.
    Versions of the policy are numbers; a scripted model's is not, and says nothing of the policy's.
    """
    versions = spans[-1].attributes.get(WEIGHT_VERSIONS)
    if versions and versions[-1][0].isdecimal():
        answer.engine.version = versions[-1][0]
