"""Where model calls go: the engines behind the gateway, and what happens while one of them is down.

A rollout sticks to one engine (rendezvous hash), so the engine's prefix cache sees a conversation whole; when that
engine is down the next in the rollout's own order answers. What always holds: a call is repeated only while nothing
of its answer has left the gateway, so repeating is invisible, and every wait has a limit.

    choose ──► ask ──► answer
       ▲        │ cannot connect, broke off, or 503
       └─ wait ─┘ …at most admission_wait_s, then BusyError

Connections are httpcore's, kept in a plain stack for each engine. Its own pool looks at every connection for every
request, which at 32 concurrent calls costs five times as much CPU as the calls themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import anyio
import httpcore

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError, BusyError, ConfigError
from lightning_bus.spans import WEIGHT_VERSIONS, Span

CONNECT_LIMIT_S = 5.0
PROBE_LIMIT_S = 2.0
DOWN_S = 0.5  # an engine that failed is passed over this long while another one is up
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 1.0
RETRY_AFTER_S_MAX = 2.0  # an engine may ask for more, but a swap of weights is over sooner than it can know

_GONE = (
    httpcore.NetworkError,
    httpcore.TimeoutException,
    httpcore.RemoteProtocolError,
    httpcore.ConnectionNotAvailable,
)


@dataclass(slots=True, eq=False)
class Engine:
    """One engine, as the gateway knows it."""

    url: str
    origin: httpcore.Origin
    prefix: bytes
    idle: list[httpcore.AsyncHTTPConnection] = field(default_factory=list[httpcore.AsyncHTTPConnection])
    down_until_s: float = 0.0
    version: str = ""  # of the weights that last answered; salts the prefix cache


@dataclass(slots=True, eq=False)
class Answer:
    """An engine's answer. `body` is complete unless the call asked for a stream, which `chunk()` then reads."""

    engine: Engine
    status: int
    content_type: str
    body: bytes
    retry_after_s: float
    deadline_s: float
    limit_s: float
    _response: httpcore.Response | None = None
    _connection: httpcore.AsyncHTTPConnection | None = None
    _chunks: AsyncIterator[bytes] | None = None

    async def chunk(self) -> bytes | None:
        """Return the next bytes of a stream, or None at its end.

        Raises BrokenError when the engine breaks off or the time of the call is up.
        """
        if self._chunks is None:
            return None
        try:
            with anyio.fail_after(max(0.0, self.deadline_s - monotonic_s())):
                return await anext(self._chunks, None)
        except TimeoutError as exc:
            raise _too_slow(self.engine, self.limit_s) from exc
        except _GONE as exc:
            raise BrokenError(f"engine {self.engine.url} broke off in the middle of its answer ({_why(exc)})") from exc

    async def close(self) -> None:
        """Give the connection back; one whose answer was not read to its end is closed, which cancels the call."""
        response, connection = self._response, self._connection
        self._response = self._connection = self._chunks = None
        if response is None or connection is None:
            return
        with anyio.CancelScope(shield=True):
            await response.aclose()
            await _keep(self.engine, connection)


class Upstreams:
    """The engines behind one gateway."""

    def __init__(self, urls: Sequence[str], *, admission_wait_s: float, request_limit_s: float) -> None:
        if not urls:
            raise ConfigError("gateway.upstreams is empty. Name at least one engine, such as http://127.0.0.1:4752.")
        self.engines = [_engine(url) for url in urls]
        self._admission_wait_s = admission_wait_s
        self._request_limit_s = request_limit_s

    def engine_of(self, key: str) -> Engine:
        """Return the engine that calls of this rollout go to now."""
        ranked = self._ranked(key)
        now_s = monotonic_s()
        return next((engine for engine in ranked if engine.down_until_s <= now_s), ranked[0])

    async def call(self, key: str, method: str, target: str, body: bytes = b"", *, stream: bool = False) -> Answer:
        """Return an engine's answer, whatever its status but 503. Close it when it was asked for as a stream.

        key     the rollout; calls with one key go to one engine
        target  path below the engine's URL, such as "/v1/chat/completions"

        Raises BusyError when no engine took the call within admission_wait_s, and BrokenError when one took it and
        did not answer within request_limit_s.
        """
        give_up_s = monotonic_s() + self._admission_wait_s
        backoff_s = BACKOFF_S_MIN
        while True:
            engine = self.engine_of(key)
            wait_s = backoff_s
            try:
                answer = await self._ask(engine, method, target, body, stream)
                if answer.status != 503:
                    engine.down_until_s = 0.0
                    return answer
                why = f"answered 503 {answer.body[:200].decode(errors='replace')}"
                wait_s = max(backoff_s, min(answer.retry_after_s, RETRY_AFTER_S_MAX))
            except _GONE as exc:
                why = _why(exc)
            now_s = monotonic_s()
            engine.down_until_s = now_s + DOWN_S
            if any(other.down_until_s <= now_s for other in self.engines):
                continue
            if now_s + wait_s > give_up_s:
                raise BusyError(
                    f"engine {engine.url} took no call within {self._admission_wait_s:g} s ({why}). It may be restarting; "
                    "try again, or raise [gateway] admission_wait_s."
                )
            await anyio.sleep(wait_s)
            engine.down_until_s = 0.0
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def probe(self) -> dict[str, str]:
        """Return, by URL, "ok" or why the engine is not."""

        async def one(engine: Engine) -> None:
            try:
                with anyio.fail_after(PROBE_LIMIT_S):
                    answer = await self._ask(engine, "GET", "/health", b"", False)
                result[engine.url] = "ok" if answer.status == 200 else f"answered {answer.status}"
            except TimeoutError:
                result[engine.url] = f"silent for {PROBE_LIMIT_S:g} s"
            except (*_GONE, BrokenError) as exc:
                result[engine.url] = _why(exc)

        result: dict[str, str] = {}
        async with anyio.create_task_group() as tasks:
            for engine in self.engines:
                tasks.start_soon(one, engine)
        return result

    async def aclose(self) -> None:
        """Close the idle connections."""
        for engine in self.engines:
            while engine.idle:
                await engine.idle.pop().aclose()

    def _ranked(self, key: str) -> list[Engine]:
        """The engines in this rollout's order: each rollout has its own, and it survives engines coming and going."""
        if len(self.engines) == 1:
            return self.engines
        return sorted(self.engines, key=lambda e: hashlib.blake2b(f"{e.url} {key}".encode(), digest_size=8).digest())

    async def _ask(self, engine: Engine, method: str, target: str, body: bytes, stream: bool) -> Answer:
        """Ask one engine once. Raises what httpcore raises when it cannot be reached or breaks off."""
        deadline_s = monotonic_s() + self._request_limit_s
        url = httpcore.URL(
            scheme=engine.origin.scheme,
            host=engine.origin.host,
            port=engine.origin.port,
            target=engine.prefix + target.encode(),
        )
        headers = [
            (b"host", engine.origin.host + b":%d" % engine.origin.port),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        request = httpcore.Request(method, url, headers=headers, content=body, extensions=_EXTENSIONS)
        try:
            with anyio.fail_after(self._request_limit_s):
                while True:
                    connection, used = await _connection(engine)
                    try:
                        response = await connection.handle_async_request(request)
                        break
                    except _GONE:
                        # A kept connection may have been closed by the engine a moment ago, which says nothing of
                        # the engine. A new one tells.
                        await connection.aclose()
                        if not used:
                            raise
                answer = _answer(engine, response, connection, deadline_s, self._request_limit_s)
                if stream and answer.status == 200:
                    return answer
                try:
                    answer.body = await response.aread()
                finally:
                    await answer.close()
                return answer
        except TimeoutError as exc:
            raise _too_slow(engine, self._request_limit_s) from exc


_EXTENSIONS = {"timeout": {"connect": CONNECT_LIMIT_S}}


def _engine(url: str) -> Engine:
    parsed = httpcore.URL(url)
    if parsed.scheme not in (b"http", b"https") or not parsed.host:
        raise ConfigError(f"gateway.upstreams: {url!r} is not an address. Write it like http://127.0.0.1:4752.")
    return Engine(url, parsed.origin, parsed.target.rstrip(b"/"))


async def _connection(engine: Engine) -> tuple[httpcore.AsyncHTTPConnection, bool]:
    """Return a connection to the engine, and whether it has been used before."""
    while engine.idle:
        connection = engine.idle.pop()  # the newest: the others may grow old and be closed
        if connection.is_available() and not connection.has_expired():
            return connection, True
        await connection.aclose()
    return httpcore.AsyncHTTPConnection(origin=engine.origin), False


async def _keep(engine: Engine, connection: httpcore.AsyncHTTPConnection) -> None:
    if connection.is_idle():
        engine.idle.append(connection)
    else:
        await connection.aclose()


def _answer(
    engine: Engine,
    response: httpcore.Response,
    connection: httpcore.AsyncHTTPConnection,
    deadline_s: float,
    limit_s: float,
) -> Answer:
    headers = {name.lower(): value for name, value in response.headers}
    retry_after = headers.get(b"retry-after", b"0").decode("latin-1")
    return Answer(
        engine=engine,
        status=response.status,
        content_type=headers.get(b"content-type", b"application/json").decode("latin-1"),
        body=b"",
        retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0,
        deadline_s=deadline_s,
        limit_s=limit_s,
        _response=response,
        _connection=connection,
        _chunks=aiter(response.aiter_stream()),
    )


def _too_slow(engine: Engine, limit_s: float) -> BrokenError:
    return BrokenError(
        f"engine {engine.url} did not finish the call within {limit_s:g} s. Ask for fewer tokens, or raise [gateway] request_limit_s."
    )


def _why(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


def learn_version(answer: Answer, spans: Sequence[Span]) -> None:
    """Remember which weights the engine answers with, for the salt of the next call's prefix cache.

    Keys and values computed under old weights would give the new version's name to log-probs that are not its own.
    Versions of the policy are numbers; a scripted model's is not, and says nothing of the policy's.
    """
    versions = spans[-1].attributes.get(WEIGHT_VERSIONS)
    if versions and versions[-1][0].isdecimal():
        answer.engine.version = versions[-1][0]
