"""HTTP/1.1 to an engine: one request at a time on a connection that is kept.

What always holds: an answer's bytes are handed on as they come, however the engine cuts them into chunks; a connection
is used again only when its answer was read to the end and the engine lets it live; whatever else goes wrong is `Gone`.
The engine's bytes are parsed in C (httptools, which uvicorn uses for ours), because this runs for every token of every
agent: a general client costs several times the CPU of everything else that the gateway does to a call.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol
from urllib.parse import urlsplit

import httptools

BUFFERED_BYTES_MAX = 1 << 20  # of an answer that nobody reads as fast; the engine then waits


class Gone(Exception):
    """The engine could not be reached, or broke off, or does not speak HTTP."""


class Witness(Protocol):
    """Who is told that connections come and go."""

    def connected(self) -> None: ...

    def disconnected(self, *, announced: bool) -> None: ...


class Connection(asyncio.Protocol):
    """One connection. `request`, then `read` until it returns b"", then `request` again while `reusable`."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._buffered = 0
        self._complete = True
        self._has_head = False
        self._keeps = True
        self.late = False  # the time given is up
        self._why = ""  # the connection is of no use any more, and why
        self._until_close = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def reusable(self) -> bool:
        """True while the next request may go over this connection."""
        return self._complete and self._keeps and not self._why

    async def request(self, head: bytes, body: bytes) -> None:
        """Send a request and return when the head of its answer has come, in `status` and `headers`."""
        if self._why:
            raise Gone(self._why)  # since it was kept
        assert self.reusable and self._transport is not None
        self.status, self.headers = 0, {}
        self._complete = self._has_head = self._until_close = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(head + body)
        while not self._has_head:
            await self._wait()

    async def read(self) -> bytes:
        """Return the next bytes of the answer; b"" at its end. Raises Gone when the engine broke off before it."""
        while not self._body:
            if self._complete:
                return b""
            await self._wait()
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        if self._buffered > BUFFERED_BYTES_MAX and self._transport is not None and not self._why:
            self._transport.resume_reading()
        self._buffered = 0
        return data

    def give(self, limit_s: float) -> None:
        """Let the next answer take so long, until `done`; then whoever waits gets Gone, and `late` is true."""
        self._timer = asyncio.get_running_loop().call_later(limit_s, self._time_is_up)

    def done(self) -> None:
        """The answer has been read, or is not wanted any more: its time no longer matters."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Close the connection, whatever it is at; the engine takes that as the end of the call."""
        self.done()
        self._why = self._why or "closed"
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._why:
            raise Gone(self._why)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _time_is_up(self) -> None:
        self.late = True
        self._fail("took too long")
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # pyright: ignore[reportAttributeAccessIssue]  # uvloop's is no asyncio.Transport
        self._witness.connected()

    def data_received(self, data: bytes) -> None:
        if self._complete:
            self._fail("said something unasked")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"does not speak HTTP: {exc}")
        if self._buffered > BUFFERED_BYTES_MAX and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._until_close and self._has_head and exc is None:
            self._complete = True  # an answer without a length ends with its connection
        self._why = self._why or (str(exc) if exc else "closed the connection")
        self._witness.disconnected(announced=not self._keeps)
        self._wake()

    def _fail(self, why: str) -> None:
        self._why = why
        if self._transport is not None:
            self._transport.abort()

    # -- what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # 100 Continue and its like: the answer is still to come
            return
        self._keeps = self._parser.should_keep_alive()
        self._until_close = b"content-length" not in self.headers and b"transfer-encoding" not in self.headers
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self._has_head:
            self._complete = True


class Address:
    """Where an engine is."""

    def __init__(self, url: str) -> None:
        parsed = urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(url)
        self.host = parsed.hostname
        self.port = parsed.port or (443 if parsed.scheme == "https" else 80)
        self._prefix = parsed.path.rstrip("/")
        self._ssl = ssl.create_default_context() if parsed.scheme == "https" else None
        self._fixed = f"host: {parsed.netloc.rpartition('@')[2]}\r\ncontent-type: application/json\r\n".encode()

    async def connect(self, limit_s: float, witness: Witness) -> Connection:
        """Return a new connection. Raises Gone when none comes about within the limit."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(witness), self.host, self.port, ssl=self._ssl
                )
        except TimeoutError as exc:
            raise Gone(f"did not accept a connection within {limit_s:g} s") from exc
        except OSError as exc:
            raise Gone(exc.strerror or str(exc)) from exc
        return connection

    def head(self, method: str, target: str, body: bytes) -> bytes:
        """Return the head of a request with this body."""
        return (
            f"{method} {self._prefix}{target} HTTP/1.1\r\n".encode()
            + self._fixed
            + b"content-length: %d\r\n\r\n" % len(body)
        )
