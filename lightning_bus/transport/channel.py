"""What both sides of a connection share: a socket that tasks of one event loop read and write.

Wait until readable, then drain without blocking: one awaited future per message costs six times as much. What every
line here guards against: `zmq.FD` is edge-triggered, so a send can swallow the edge that a sleeping reader waits for
(we look again after every send); a context never ends with messages lingering unless linger is bounded (it is).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio
import zmq
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from lightning_bus.errors import ClosedError
from lightning_bus.messages import MESSAGE_BYTES_MAX

M = TypeVar("M")

DRAIN_MESSAGES_MAX = 512  # then others get their turn
LINGER_MS = 500
HANDSHAKE_MS = 2000  # half-open connections are dropped after this
BEAT_MS = 2000  # ZMTP's own heartbeat: finds connections that died without a FIN
BEAT_TIMEOUT_MS = 10_000
QUEUE_MESSAGES_MAX = 10_000

# Plain numbers, and frames instead of the multipart calls: half the time of a small message went there.
NOBLOCK = int(zmq.NOBLOCK)
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


class Channel(ABC, Generic[M]):
    """A ZeroMQ socket that tasks of one event loop share. Close it, or use it as a context manager."""

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[Any]) -> None:
        self._context = context
        self._socket = socket
        self._waiting: anyio.CancelScope | None = None
        self._closed = False

    async def receive(self) -> list[M]:
        """Return at least one message; more when more are there.

        Messages taken from the socket are always returned: cancellation can only arrive while none is in hand.
        """
        while True:
            if self._closed:
                raise ClosedError("this channel was closed; open a new client")
            batch = self._drain()
            if batch:
                await cancel_shielded_checkpoint()
                return batch
            if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                await checkpoint()  # what came was refused, and there is more: the edge that tells of it is used up
                continue
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
            for frame in frames[:-1]:
                self._socket.send(frame, MORE)
            self._socket.send(frames[-1], NOBLOCK)
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
            self._end()
            self._context.destroy(linger=LINGER_MS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> list[zmq.Frame]:
        """Return the frames of one message. Raises zmq.Again when there is none."""
        frame = self._socket.recv(NOBLOCK, False)
        frames = [frame]
        while frame.more:
            frame = self._socket.recv(NOBLOCK, False)
            frames.append(frame)
        return frames

    @abstractmethod
    def _drain(self) -> list[M]:
        """Return what is there, up to DRAIN_MESSAGES_MAX, without waiting."""

    def _end(self) -> None:
        """End what runs beside the socket, before the context goes."""


def new_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    """Return a socket with the options that both sides share."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, BEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, BEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, BEAT_TIMEOUT_MS)
    return socket
