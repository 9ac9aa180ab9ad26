"""A bad network: a TCP proxy that delays, cuts, resets and goes silent when it is told to.

What always holds: bytes that it forwards are the bytes that it was given, in order; a connection made after a fault is
a good one.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import SocketAttribute, SocketStream

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing sends RST and drops what was not sent


class Connection:
    """Two streams and what is to become of them."""

    def __init__(self, client: SocketStream, server: SocketStream) -> None:
        self.ends = client, server
        self.bytes_left: int | None = None
        self.frozen = False
        self.scope = anyio.CancelScope()


class Proxy:
    """Stands before `target` at `address`. Make one with `proxy_before`."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.delay_s = 0.0  # of each piece, either way
        self.accepted = 0
        self.lets_in = anyio.Event()  # while it is not set, new connections wait
        self.lets_in.set()
        self._target = target.removeprefix("tcp://").rsplit(":", 1)
        self._open: set[Connection] = set()

    def cut(self, after_bytes: int) -> None:
        """End every open connection (FIN) after so many more bytes, in the middle of whatever they are part of."""
        for connection in self._open:
            connection.bytes_left = after_bytes

    def reset(self) -> None:
        """End every open connection now (RST), dropping what is on its way."""
        for connection in self._open:
            for end in connection.ends:
                end.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.scope.cancel()

    def freeze(self) -> None:
        """Forward nothing more on the connections that are open, and do not tell either side."""
        for connection in self._open:
            connection.frozen = True

    async def serve(self, client: SocketStream) -> None:
        self.accepted += 1
        await self.lets_in.wait()
        host, port = self._target
        try:
            server = await anyio.connect_tcp(host, int(port))
        except OSError:
            return await client.aclose()  # nobody is there: the client finds the door shut, as it would without us
        connection = Connection(client, server)
        self._open.add(connection)
        try:
            async with client, server:
                with connection.scope:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._forward, connection, client, server)
                        tasks.start_soon(self._forward, connection, server, client)
        finally:
            self._open.discard(connection)

    async def _forward(self, connection: Connection, source: SocketStream, target: SocketStream) -> None:
        try:
            async for piece in source:
                if self.delay_s:
                    await anyio.sleep(self.delay_s)
                if connection.frozen:
                    await anyio.sleep_forever()
                if connection.bytes_left is not None:
                    piece = piece[: connection.bytes_left]
                    connection.bytes_left -= len(piece)
                if piece:
                    await target.send(piece)
                if connection.bytes_left == 0:
                    break
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # one side is gone; so is the other now
        connection.scope.cancel()


@asynccontextmanager
async def proxy_before(target: str) -> AsyncIterator[Proxy]:
    """Give a proxy that forwards to a tcp:// address while the context is open."""
    proxy = Proxy(target)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    proxy.address = f"tcp://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, proxy.serve)
        yield proxy
        tasks.cancel_scope.cancel()
