"""Who may come in: the broker's doorkeeper.

libzmq asks, for each handshake, a handler at a fixed address of the same context (ZAP, RFC 27): may this public key
connect? The doorkeeper answers from the ring, and reads the socket's monitor beside it, where handshakes are reported
that fail before they get that far. It lives in a thread of its own, because while nobody answers every handshake
stalls, whatever the event loop is busy with; no request, however strange, ends it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any, Protocol

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from lightning_bus.clock import monotonic_s

DOMAIN = b"lightning-bus"
HANDLER = "inproc://zeromq.zap.01"  # where libzmq looks for it
LOG_EVERY_S = 10.0  # and reason; who is refused tries again, twenty times a second

_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_REASONS = {
    0x11000002: "no key",  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    0x11000001: "wrong server key",  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
}

log = logging.getLogger("lightning_bus.broker")


class Holder(Protocol):
    """Who holds a key; `keys.Identity` is one."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def prefix(self) -> bytes: ...  # what the names of its connections begin with


class Ring(Protocol):
    """What the transport asks of the keys; `keys.KeyRing` answers. Both questions come from several threads."""

    @property
    def server_secret(self) -> str: ...

    def lookup(self, public: str) -> Holder | None:
        """Who holds this key; None when it is unknown or revoked. Asked for each message."""
        ...

    def admit(self, public: str) -> Holder | str:
        """The same for each handshake, as of now: who holds this key, or why it is refused."""
        ...


class Tally:
    """Counts by reason, which several threads add to."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, reason: str) -> int:
        """Count one; return how many of them there were."""
        with self._lock:
            self._counts[reason] += 1
            return self._counts[reason]

    def counts(self) -> Counter[str]:
        """Return a copy: a reason may be added while somebody goes through them."""
        with self._lock:
            return self._counts.copy()


class Doorkeeper:
    """Answers for one socket until it is closed. Create it before the socket is bound."""

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[Any], ring: Ring, refused: Tally) -> None:
        self._ring = ring
        self._refused = refused
        self._logged_s: dict[str, float] = {}
        self._handler = context.socket(zmq.REP)
        self._handler.bind(HANDLER)
        self._end_there, self._end_here = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._end_there.bind("inproc://doorkeeper-end")
        self._end_here.connect("inproc://doorkeeper-end")
        socket.monitor("inproc://doorkeeper-monitor", _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.connect("inproc://doorkeeper-monitor")
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. The socket's monitor must have been disabled before."""
        self._end_here.send(b"")
        self._thread.join()
        self._end_here.close(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._handler, self._monitor, self._end_there):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._end_there in ready:
                break
            if self._handler in ready:
                self._answer(self._handler.recv_multipart())
            if self._monitor in ready:
                self._note(self._monitor.recv_multipart())
        for socket in (self._handler, self._monitor, self._end_there):
            socket.close(linger=0)

    def _answer(self, request: list[bytes]) -> None:
        code, text, user = b"300", b"try again", b""  # the only refusal after which libzmq does
        try:
            code, text, user = self._decide(request)
        except Exception:  # whatever it is, the next handshake needs an answer
            log.exception("a handshake could not be judged and was refused")
            self._refused.add("failure")
        number = request[1] if len(request) > 1 else b""
        self._handler.send_multipart([b"1.0", number, code, text, user, b""])

    def _decide(self, request: list[bytes]) -> tuple[bytes, bytes, bytes]:
        """Return status code, its text, and the user id: the public key, which names one key for ever."""
        _, _, domain, address, _, mechanism, *credentials = request
        if domain != DOMAIN or mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            self._refuse("no key", address)
            return b"400", b"no key", b""
        public = z85.encode(credentials[0])
        holder = self._ring.admit(public.decode())
        if isinstance(holder, str):
            self._refuse(holder, address)
            return b"400", holder.encode(), b""
        return b"200", b"OK", public

    def _note(self, message: list[bytes]) -> None:
        """Count a handshake that failed before we were asked. Who hangs up first decides whether a reason is known."""
        self._refuse(_REASONS.get(parse_monitor_message(message)["value"], "broken handshake"), b"")

    def _refuse(self, reason: str, address: bytes) -> None:
        """Count it, and log it unless the same was logged a moment ago: the log's disk is also the spans'."""
        count = self._refused.add(reason)
        now_s = monotonic_s()
        if now_s - self._logged_s.get(reason, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged_s[reason] = now_s
            where = f" from {address.decode(errors='replace')}" if address else ""
            log.warning("refused a connection%s: %s (%d so far)", where, reason, count)
