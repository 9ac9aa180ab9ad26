"""The network between clients and broker, and every harm it can do.

A link is one client's connection: in order while it lasts, as ZeroMQ over TCP is. Harm: a message is lost, delayed,
damaged, or arrives a second time much later; a connection is cut, and what was under way is lost or straggles in
after newer messages of the next connection; one direction or both go silent while senders notice nothing; everything
stalls and then arrives at once. Whoever is killed can send no more.

Damage is done to bodies and blobs only: the checksum does not cover the header (docs/protocol.md says so).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from lightning_bus.transport import Arrived
from tests.simulation.virtual_time import Bell, VirtualLoop

M = TypeVar("M")
Frames = list[bytes]
Direction = Literal["up", "down"]  # to the broker, from the broker
ROLES = {
    "admin": "admin", "auditor": "admin", "gateway": "gateway", "reader": "trainer", "trainer": "trainer",
    "waiter": "trainer", "watcher": "agent", "worker": "worker",
}  # fmt: skip
IN_ORDER_S = 1e-6  # between two messages of a connection: timers of the same moment have no order


@dataclass(slots=True)
class Weather:
    """How bad the network is. The default is a perfect one."""

    delay_s: float = 0.002  # mean
    lose: float = 0.0  # probabilities of a message
    repeat: float = 0.0
    damage: float = 0.0
    straggle: float = 0.0  # of a message under way when its connection is cut
    late_s: float = 5.0  # mean of how late repeats and stragglers come


@dataclass(slots=True)
class Link:
    """One client's connection, and what is wrong with it."""

    identity: str
    client: ClientChannel
    generation: int = 0  # counts connections
    connected_at_s: float = 0.0  # until then sends are refused
    silent: set[Direction] = field(default_factory=set[Direction])  # lost without a word
    stalled_until_s: float = 0.0
    arrives_s: dict[Direction, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})


class Inbox(Generic[M]):
    """Messages that have arrived, and whoever waits for them."""

    def __init__(self) -> None:
        self.dead = False
        self._messages: deque[M] = deque()
        self._arrived = Bell()

    def put(self, message: M) -> None:
        self._messages.append(message)
        self._arrived.ring()

    async def receive(self) -> list[M]:
        while not self._messages:
            await self._arrived.wait()
        batch = list(self._messages)
        self._messages.clear()
        return batch


class ClientChannel(Inbox[Frames]):
    """What `transport.connect_dealer` returns, here."""

    def __init__(self, network: Network, identity: str) -> None:
        super().__init__()
        self._network = network
        self._identity = identity

    def send(self, frames: Sequence[bytes]) -> bool:
        return self.dead or self._network.send_up(self._identity, list(frames))

    def close(self) -> None:
        self._network.disconnect(self._identity, self)


class RouterChannel(Inbox[Arrived]):
    """What `transport.bind_router` returns, here."""

    def __init__(self, network: Network, sending: Callable[[], None]) -> None:
        super().__init__()
        self.refused: dict[str, int] = {}  # nobody is
        self._network = network
        self._sending = sending  # called before each message; the broker may die of it
        self.refused = Counter[str]()

    def send(self, frames: Sequence[bytes]) -> bool:
        self._sending()
        return self.dead or self._network.send_down(frames[0].decode(), list(frames[1:]))

    def close(self) -> None:
        self._network.unbind(self)

    def __enter__(self) -> RouterChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Network:
    """All links. `note` is told what happens, for the history of a failing seed."""

    def __init__(
        self, loop: VirtualLoop, chance: random.Random, weather: Weather, note: Callable[..., None] | None
    ) -> None:
        self.weather = weather
        self.keys = False  # everybody has a key, which says what they may do
        self.links: dict[str, Link] = {}
        self.messages = 0
        self._loop = loop
        self._chance = chance
        self._note = note
        self._router: RouterChannel | None = None

    # -- what stands in for lightning_bus.transport

    def connect(self, address: str, identity: str, key: object = None) -> ClientChannel:
        channel = ClientChannel(self, identity)
        # A client that comes back under its old name takes the name over (ROUTER_HANDOVER).
        link = self.links[identity] = Link(identity, channel)
        link.connected_at_s = self._loop.time() + self._chance.uniform(0.001, 0.02)
        return channel

    def bind(self, sending: Callable[[], None] = lambda: None) -> RouterChannel:
        assert self._router is None, "one broker at a time"
        self._router = RouterChannel(self, sending)
        return self._router

    def disconnect(self, identity: str, channel: ClientChannel) -> None:
        channel.dead = True
        link = self.links.get(identity)
        if link is not None and link.client is channel:
            self.cut(link)

    def unbind(self, channel: RouterChannel) -> None:
        channel.dead = True
        if self._router is channel:
            self._router = None
            for link in self.links.values():
                self.cut(link)

    # -- harm

    def cut(self, link: Link) -> None:
        """The connection breaks; the client makes a new one."""
        link.generation += 1
        link.arrives_s = {"up": 0.0, "down": 0.0}
        link.connected_at_s = self._loop.time() + self._chance.uniform(0.05, 0.5)

    def heal(self) -> None:
        self.weather = Weather()
        for link in self.links.values():
            link.silent.clear()
            if link.stalled_until_s > self._loop.time():
                link.stalled_until_s = 0.0
                self.cut(link)

    # -- messages

    def send_up(self, identity: str, frames: Frames) -> bool:
        link = self.links[identity]
        if self._router is None or self._loop.time() < link.connected_at_s:
            return False
        self._post(link, "up", frames)
        return True

    def send_down(self, identity: str, frames: Frames) -> bool:
        link = self.links.get(identity)
        if link is None or link.client.dead or self._loop.time() < link.connected_at_s:
            return False
        self._post(link, "down", frames)
        return True

    def _post(self, link: Link, direction: Direction, frames: Frames) -> None:
        chance, weather, now_s = self._chance, self.weather, self._loop.time()
        self.messages += 1
        if direction in link.silent or (weather.lose and chance.random() < weather.lose):
            if self._note is not None:
                self._note("lost", direction, link.identity, frames)
            return
        if weather.damage and chance.random() < weather.damage:
            frames = self._damaged(frames)
        at_s = max(now_s + chance.expovariate(1.0 / weather.delay_s), link.stalled_until_s)
        at_s = max(at_s, link.arrives_s[direction] + IN_ORDER_S)
        link.arrives_s[direction] = at_s
        self._loop.call_at(at_s, self._arrive, link, direction, frames, link.generation, False)
        if weather.repeat and chance.random() < weather.repeat:
            late_s = now_s + chance.expovariate(1.0 / weather.late_s)
            self._loop.call_at(late_s, self._arrive, link, direction, frames, link.generation, True)

    def _arrive(self, link: Link, direction: Direction, frames: Frames, generation: int, late: bool) -> None:
        if generation != link.generation and not late:
            if not (self.weather.straggle and self._chance.random() < self.weather.straggle):
                return
            late_s = self._loop.time() + self._chance.expovariate(1.0 / self.weather.late_s)
            self._loop.call_at(late_s, self._arrive, link, direction, frames, generation, True)
            return
        if self._note is not None:
            self._note("late" if late else "", direction, link.identity, frames)
        if direction == "down":
            if not link.client.dead:
                link.client.put(frames)
        elif self._router is not None:
            role = ROLES[link.identity.partition("-")[0]] if self.keys else ""
            self._router.put(Arrived(link.identity.encode(), "", frames, role))

    def _damaged(self, frames: Frames) -> Frames:
        index = self._chance.randrange(1, len(frames))
        frame = bytearray(frames[index])
        if not frame:
            return frames
        frame[self._chance.randrange(len(frame))] ^= 1 << self._chance.randrange(8)
        return [*frames[:index], bytes(frame), *frames[index + 1 :]]
