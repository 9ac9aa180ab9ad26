"""What leaves the broker: small answers of one turn as one message a peer, large ones only as fast as they are taken.

Handing a message to ZeroMQ costs the same whether it is an acknowledgement or a megabyte, so what is said to a peer in
one turn of the event loop leaves together. And ZeroMQ counts messages, not bytes: a peer that asks for much and reads
nothing would have its answers kept in our memory. So of large answers only WINDOW_BYTES are under way to one peer.
What was taken shows when the peer goes on from where an answer ended. What never shows is written off after TAKEN_S,
soon enough for a connection that was lost and for a reader that jumps about. A peer that meanwhile asked for more and
more waits twice as long each time, so that one that is stuck costs less and less until ZeroMQ cuts it off.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from lightning_bus import wire
from lightning_bus.transport import Router

LARGE_BYTES = 64 << 10  # from here on an answer is counted
WINDOW_BYTES = 16 << 20  # two of the largest FETCHes
WINDOWS_BYTES_MAX = 512 << 20  # to all peers together
TAKEN_S = 5.0  # half of the silence after which ZeroMQ gives a connection up
TAKEN_MAX_S = 80.0
PATIENCE_MAX = 10_000  # peers of which that is remembered


class Outbox:
    """Small messages that leave at the end of this turn."""

    def __init__(self, channel: Router) -> None:
        self._channel = channel
        self._waiting: dict[bytes, list[wire.Packed]] = {}

    def put(self, identity: bytes, message: wire.Packed) -> None:
        """Send with whatever else is said to this peer before the turn ends."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        waiting = self._waiting.get(identity)
        if waiting is None:
            self._waiting[identity] = [message]
        else:
            waiting.append(message)

    def put_alone(self, identity: bytes, message: wire.Packed) -> bool:
        """Send now, after what was put before. False when it was not taken, because the peer is gone or full."""
        self.flush()
        (frames,) = wire.join([message])
        return self._channel.send([identity, *frames])

    def flush(self) -> None:
        """Send, or drop: a reply that cannot be delivered is asked for again, a task that is lost is sent again."""
        waiting, self._waiting = self._waiting, {}
        for identity, messages in waiting.items():
            for frames in wire.join(messages):
                self._channel.send([identity, *frames])


class Windows:
    """How many bytes of large answers each peer may still have under way."""

    def __init__(self) -> None:
        self._sent: dict[str, deque[tuple[int, int, float]]] = {}  # (offset to go on from or -1, bytes, when)
        self._bytes: dict[str, int] = {}
        self._bytes_all = 0
        self._patience_s: dict[str, float] = {}  # where it is not TAKEN_S

    def room(self, peer: str, size: int) -> bool:
        """Whether a large answer may leave now. One always may when none is under way to this peer."""
        under_way = self._bytes.get(peer, 0)
        if under_way + size > WINDOW_BYTES and under_way > 0:
            return False
        return self._bytes_all + size <= WINDOWS_BYTES_MAX or self._bytes_all == 0

    def sent(self, peer: str, size: int, now_s: float, next_offset: int = -1) -> None:
        """A large answer left. `next_offset` is what the peer can only know from it."""
        self._sent.setdefault(peer, deque()).append((next_offset, size, now_s))
        self._bytes[peer] = self._bytes.get(peer, 0) + size
        self._bytes_all += size

    def went_on(self, peer: str, offset: int) -> None:
        """The peer asks for what begins here: the answer that ended here was taken, and all that were sent before it."""
        sent = self._sent.get(peer)
        if sent is not None and any(next_offset == offset for next_offset, _, _ in sent):
            self._patience_s.pop(peer, None)
            while self._write_off(peer, sent) != offset:
                pass

    def write_off(self, now_s: float, is_greedy: Callable[[str], bool]) -> None:
        """Count no longer what was sent long ago. `is_greedy` tells whether a peer has asked for much more since."""
        for peer, sent in list(self._sent.items()):
            patience_s = self._patience_s.get(peer, TAKEN_S)
            written_off = False
            while sent and sent[0][2] <= now_s - patience_s:
                self._write_off(peer, sent)
                written_off = True
            if written_off and not is_greedy(peer):
                self._patience_s.pop(peer, None)
            elif written_off:
                if len(self._patience_s) >= PATIENCE_MAX:
                    self._patience_s.clear()
                self._patience_s[peer] = min(2 * patience_s, TAKEN_MAX_S)

    def _write_off(self, peer: str, sent: deque[tuple[int, int, float]]) -> int:
        next_offset, size, _ = sent.popleft()
        self._bytes_all -= size
        self._bytes[peer] -= size
        if not sent:
            del self._sent[peer], self._bytes[peer]
        return next_offset
