"""Raw ZeroMQ sockets behind a small anyio face.

Wait until readable, then drain without blocking: one awaited future per message costs six times as much. What every
line here guards against: `zmq.FD` is edge-triggered, so a send can swallow the edge that a sleeping reader waits for
(we look again after every send); a ROUTER drops silently what it cannot deliver unless told not to (MANDATORY is
on); a context never ends with messages lingering unless linger is bounded (it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import anyio
import zmq
from anyio.lowlevel import cancel_shielded_checkpoint

from lightning_bus.errors import CallError, ClosedError
from lightning_bus.messages import MESSAGE_BYTES_MAX

DRAIN_MESSAGES_MAX = 512  # then others get their turn
LINGER_MS = 500
HANDSHAKE_MS = 2000  # half-open connections are dropped after this
BEAT_MS = 2000  # ZMTP's own heartbeat: finds connections that died without a FIN
BEAT_TIMEOUT_MS = 10_000
QUEUE_MESSAGES_MAX = 10_000


class Channel:
    """A ZeroMQ socket that tasks of one event loop share. Close it, or use it as a context manager."""

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[Any]) -> None:
        self._context = context
        self._socket = socket
        self._waiting: anyio.CancelScope | None = None
        self._closed = False

    async def receive(self) -> list[list[bytes]]:
        """Return at least one message, each a list of frames; more when more are there.

        Messages taken from the socket are always returned: cancellation can only arrive while none is in hand.
        """
        while True:
            batch = self._drain()
            if batch:
                await cancel_shielded_checkpoint()
                return batch
            with anyio.CancelScope() as self._waiting:
                await anyio.wait_readable(self._socket.FD)
            self._waiting = None

    def send(self, frames: Sequence[bytes]) -> bool:
        """Hand one message to ZeroMQ. False when it could not be taken: the peer is gone or its queue is full.

        Nothing is promised by True either; whoever needs to know asks for an answer and sends again.
        """
        if self._closed:
            raise ClosedError("this channel was closed; open a new client")
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                return False
            raise
        finally:
            if self._waiting is not None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._waiting.cancel()
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._context.destroy(linger=LINGER_MS)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drain(self) -> list[list[bytes]]:
        if self._closed:
            raise ClosedError("this channel was closed; open a new client")
        batch: list[list[bytes]] = []
        while len(batch) < DRAIN_MESSAGES_MAX:
            try:
                batch.append(self._socket.recv_multipart(zmq.NOBLOCK, copy=True))
            except zmq.Again:
                break
        return batch


def bind_router(address: str) -> tuple[Channel, str]:
    """Return the broker's channel and the address it is bound to ("…:*" picks a free port).

    Messages of a ROUTER begin with a frame that names the peer. Raises CallError when the address cannot be bound.
    """
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    _set_options(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say so when a peer cannot be reached
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects keeps its name
    try:
        socket.bind(address)
    except zmq.ZMQError as exc:
        context.destroy(linger=0)
        raise CallError(
            f"[broker] bind = {address!r}: {exc.strerror}. Stop the process that uses it, or choose another address."
        ) from exc
    return Channel(context, socket), socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect_dealer(address: str, identity: str) -> Channel:
    """Return a client's channel. It reconnects by itself; nothing is lost but what was on the way."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    _set_options(socket)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    # Queue for a connection, never for an address: requests are sent again anyway, and copies for a broker that is
    # away would pile up, one a second.
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    try:
        socket.connect(address)
    except zmq.ZMQError as exc:
        context.destroy(linger=0)
        raise CallError(
            f"{address!r} is not an address to connect to: {exc.strerror}. Example: tcp://127.0.0.1:4750"
        ) from exc
    return Channel(context, socket)


def _set_options(socket: zmq.Socket[Any]) -> None:
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, BEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, BEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, BEAT_TIMEOUT_MS)
