"""The broker's side of the connection: who sent a message, and who gets the answer.

A ROUTER believes whatever name a client gives itself, hands the answers of a name to whoever connected under it last,
and drops silently what it cannot deliver unless told not to (MANDATORY is on). On a plain, local socket that is how a
client that reconnects keeps its name. With keys it has to be earned:

- A message belongs to the key that its connection proved, asked of libzmq for each message and looked up each time,
  so a revoked key ends with the next message.
- A connection's name begins with its key's: `<key name>/<anything>`. No key can speak under another's names.
- On the wire the name is followed by NUL and random bytes that only its client knows. So nobody can connect under the
  same routing id and collect the answers, which hold tokens and tasks.

What breaks a rule goes no further than here: it is counted, and answered with an ERROR.
"""

from __future__ import annotations

import resource
from collections import Counter, OrderedDict
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple

import zmq

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.errors import CallError, ConfigError
from lightning_bus.transport.channel import DRAIN_MESSAGES_MAX, Channel, new_socket
from lightning_bus.transport.zap import DOMAIN, Doorkeeper, Ring, Tally

ROUTES_MAX = 65_536  # names whose connection we remember; one that is forgotten is known again when it speaks
BACKLOG = 1024  # connections that wait to be accepted: a thousand workers come back at once when a broker restarts
FILES_MAX = 65_536  # each connection is one


class Arrived(NamedTuple):
    """A message, and whose it is. `user` and `role` are "" when the transport is plain."""

    identity: bytes  # the name of the connection; answers are sent to it
    user: str  # the name of the key
    frames: list[bytes]
    role: str = ""  # what the key may do


class Route(NamedTuple):
    """Where a name is reached, and the public key that proved itself there."""

    routing_id: bytes
    public: str


def bind_router(address: str, keyring: Ring | None = None) -> tuple[Router, str]:
    """Return the broker's channel and the address it is bound to ("…:*" picks a free port).

    With a ring, only holders of its keys get in. Without, the address has to be one that only this machine reaches,
    or ConfigError is raised. Raises CallError when the address cannot be bound.
    """
    if keyring is None and _beyond_loopback(address):
        raise ConfigError(
            f"[broker] bind = {address!r} is open to other machines, and there are no keys. Make some with "
            'lightning-bus keys create NAME --role worker --dir keys, and set [broker] keys = "keys"; '
            "or bind to tcp://127.0.0.1:4750."
        )
    _allow_files()
    context: zmq.Context[Any] = zmq.Context(io_threads=1 if keyring is None else 2)  # encryption keeps a thread busy
    socket = new_socket(context, zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say so when a peer cannot be reached
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects keeps its name
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    router = Router(context, socket, keyring)
    try:
        socket.bind(address)
    except zmq.ZMQError as exc:
        router.close()
        raise CallError(
            f"[broker] bind = {address!r}: {exc.strerror}. Stop the process that uses it, or choose another address."
        ) from exc
    return router, socket.getsockopt_string(zmq.LAST_ENDPOINT)


class Router(Channel[Arrived]):
    """The broker's channel. The first frame of what is sent names the receiver, as `Arrived.identity` did."""

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[Any], ring: Ring | None = None) -> None:
        super().__init__(context, socket)
        self._refused = Tally()
        self._ring = ring
        self._routes: OrderedDict[bytes, Route] = OrderedDict()
        self._doorkeeper: Doorkeeper | None = None
        if ring is not None:
            self._doorkeeper = Doorkeeper(context, socket, ring, self._refused)
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, ring.server_secret.encode())
            socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            # Or libzmq would let everybody in while nobody answers at the door.
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    @property
    def refused(self) -> Counter[str]:
        """What was turned down until now, by reason: handshakes, and messages of connections that were let in."""
        return self._refused.counts()

    def send(self, frames: Sequence[bytes]) -> bool:
        if self._ring is not None:
            route = self._routes.get(frames[0])
            if route is None or self._ring.lookup(route.public) is None:
                return False
            frames = [route.routing_id, *frames[1:]]
        return super().send(frames)

    def _drain(self) -> list[Arrived]:
        batch: list[Arrived] = []
        for _ in range(DRAIN_MESSAGES_MAX):
            try:
                first, *rest = self._take()
            except zmq.Again:
                break
            frames = [frame.bytes for frame in rest]
            arrived = Arrived(first.bytes, "", frames) if self._ring is None else self._admit(first, frames, self._ring)
            if arrived is not None:
                batch.append(arrived)
        return batch

    def _admit(self, first: zmq.Frame, frames: list[bytes], ring: Ring) -> Arrived | None:
        routing_id = first.bytes
        public = str(first.get("User-Id"))
        holder = ring.lookup(public)
        if holder is None:
            self._refuse(routing_id, "revoked key", "this key was revoked while it was connected.")
            return None
        name, nul, _ = routing_id.partition(b"\0")
        if not nul or not name.startswith(holder.prefix):
            self._refuse(
                routing_id,
                "another key's name",
                f"{name.decode(errors='replace')!r} is not a name for the key {holder.name!r}: its connections are "
                f"named {holder.name}/ANYTHING, in their routing id followed by NUL and 16 random bytes.",
            )
            return None
        route = self._routes.get(name)
        if route is None or route.routing_id != routing_id or route.public != public:
            self._routes[name] = Route(routing_id, public)
            if len(self._routes) > ROUTES_MAX:
                self._routes.popitem(last=False)
        self._routes.move_to_end(name)
        return Arrived(name, holder.name, frames, holder.role)

    def _refuse(self, routing_id: bytes, reason: str, message: str) -> None:
        self._refused.add(reason)
        super().send([routing_id, *wire.encode(m.Error("AccessDenied", message))])

    def _end(self) -> None:
        if self._doorkeeper is not None:
            self._socket.disable_monitor()  # before its reader goes, or the I/O thread may wait for it for ever
            self._doorkeeper.close()


def _beyond_loopback(address: str) -> bool:
    """Whether other machines might reach this address. A name counts: what it resolves to can change."""
    scheme, separator, rest = address.partition("://")
    if not separator or not rest or scheme in ("ipc", "inproc"):
        return False  # local, or no address at all, which bind() says better
    if scheme != "tcp":
        return True
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return bool(host)


def _allow_files() -> None:
    """Raise this process's limit of open files as far as it may: a crowd of connections must not starve the log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
