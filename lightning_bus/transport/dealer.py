"""A client's side of the connection, and why the broker does not want it.

ZeroMQ tells a client nothing of a refused handshake: it just tries again. So the socket's monitor is read whenever a
send finds no connection, and a refusal that will not change by itself is raised as AccessDenied instead of waited for.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import AccessDenied, CallError
from lightning_bus.transport.channel import DRAIN_MESSAGES_MAX, Channel, new_socket

ROUTE_BYTES = 16  # random; see router.py
HANGUPS_S = 2.0
HANGUPS_PER_S = 1.0

_MECHANISM_MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class ConnectKey(Protocol):
    """What a connection needs of a key; `keys.ClientKey` is one. The three keys are Z85, 40 characters each."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def public(self) -> str: ...
    @property
    def secret(self) -> str: ...
    @property
    def server(self) -> str: ...


def producer_name(role: str, key: ConnectKey | None = None) -> str:
    """Return a new name for a connection: of that role, or of that key, whose name it must begin with."""
    return f"{role}-{secrets.token_hex(6)}" if key is None else f"{key.name}/{secrets.token_hex(6)}"


def connect_dealer(address: str, identity: str, key: ConnectKey | None = None) -> Dealer:
    """Return a client's channel. It reconnects by itself; nothing is lost but what was on the way.

    With a key the connection is encrypted, and the name has to begin with the key's (`producer_name`).
    Raises CallError when the address is none.
    """
    context: zmq.Context[Any] = zmq.Context()
    socket = new_socket(context, zmq.DEALER)
    routing_id = identity.encode()
    if key is not None:
        # Answers go to whoever connected last under a routing id. Nobody else can know these bytes.
        routing_id += b"\0" + secrets.token_bytes(ROUTE_BYTES)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret.encode())
        socket.setsockopt(zmq.CURVE_SERVERKEY, key.server.encode())
    socket.setsockopt(zmq.IDENTITY, routing_id)
    # Queue for a connection, never for an address: requests are sent again anyway, and copies for a broker that is
    # away would pile up, one a second.
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    dealer = Dealer(context, socket, address, key)
    try:
        socket.connect(address)
    except zmq.ZMQError as exc:
        dealer.close()
        raise CallError(
            f"{address!r} is not an address to connect to: {exc.strerror}. Example: tcp://127.0.0.1:4750"
        ) from exc
    return dealer


class Hangups:
    """Tells a broker that cannot read our handshakes from one that is away or stalled.

    The first hangs up each time and at once. So does a proxy whose broker is down, but for a moment; and on a stalled
    broker's side it takes seconds.
    """

    def __init__(self) -> None:
        self._count = 0
        self._since_s = 0.0

    def add(self, now_s: float) -> bool:
        """Count one; true when they have come fast and for long."""
        if not self._count:
            self._since_s = now_s
        self._count += 1
        elapsed_s = now_s - self._since_s
        return elapsed_s >= HANGUPS_S and self._count > 1 + elapsed_s * HANGUPS_PER_S


class Dealer(Channel[list[bytes]]):
    """A client's channel. Messages are lists of frames, without any that name a peer.

    `send` raises AccessDenied when there is no connection because the broker refuses this client for good.
    """

    def __init__(
        self, context: zmq.Context[Any], socket: zmq.Socket[Any], address: str, key: ConnectKey | None
    ) -> None:
        super().__init__(context, socket)
        self._address = address
        self._key = key
        self._connected = False  # ever
        self._refusal: str | None = None  # libzmq does not try again after these, so neither do we
        self._hangups = Hangups()
        socket.monitor("inproc://monitor", _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # a full one would stop the I/O thread
        self._monitor.connect("inproc://monitor")

    def send(self, frames: Sequence[bytes]) -> bool:
        sent = super().send(frames)
        if not sent and (denied := self._denied()):
            raise denied
        return sent

    def _drain(self) -> list[list[bytes]]:
        batch: list[list[bytes]] = []
        while len(batch) < DRAIN_MESSAGES_MAX:
            try:
                batch.append([frame.bytes for frame in self._take()])
            except zmq.Again:
                break
        return batch

    def _end(self) -> None:
        self._socket.disable_monitor()  # before its reader goes, or the I/O thread may wait for it for ever

    def _denied(self) -> AccessDenied | None:
        """Read what happened to our handshakes; return why waiting is no use, if it is not."""
        while self._refusal is None:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return None
            what, value = event["event"], event["value"]
            if what == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif what == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refusal = self._why_refused()
            elif what == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MECHANISM_MISMATCH:
                self._refusal = self._why_mismatch()
            elif self._key is not None and what == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refusal = self._why_unreadable(self._key)
            elif self._key is not None and not self._connected:
                if self._hangups.add(monotonic_s()):
                    return AccessDenied(self._why_unreadable(self._key))
        return AccessDenied(self._refusal)

    def _why_refused(self) -> str:
        name = "" if self._key is None else f" {self._key.name!r} (role {self._key.role})"
        return (
            f"the broker at {self._address} refused the key{name}: it is not known there, or was revoked. "
            "See on the broker's machine: lightning-bus keys list"
        )

    def _why_mismatch(self) -> str:
        if self._key is None:
            return (
                f"the broker at {self._address} wants a key. Make one on its machine with lightning-bus keys create "
                "NAME --role ROLE, and name the file it writes in LIGHTNING_BUS_KEY."
            )
        return (
            f"the broker at {self._address} takes no keys, and this client came with {self._key.name!r}. "
            "Set [broker] keys and restart the broker, or connect without a key (unset LIGHTNING_BUS_KEY)."
        )

    def _why_unreadable(self, key: ConnectKey) -> str:
        return (
            f"the broker at {self._address} hangs up on every handshake of ours. The server's public key "
            f"that came with the key {key.name!r} is probably another broker's: take a key from this broker's directory. "
            "Or that broker takes no keys: then connect without one (unset LIGHTNING_BUS_KEY)."
        )
