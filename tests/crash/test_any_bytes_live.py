"""100,000 frames of nonsense against a live broker, with clients beside that must not notice.

Watched: the broker answers nonsense with an error or drops the peer, and goes on; its memory is flat; the clients
beside keep every promise of history.py. Not watched: what nonsense the log keeps, for a chunk is opaque to the broker.
"""

from __future__ import annotations

import itertools
import random
import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import zmq

from lightning_bus import messages as m
from lightning_bus import wire
from tests.crash.broker_lives import BrokerLives
from tests.crash.callers import calling
from tests.crash.fuzzer import SOMEBODY_ELSE, Fuzzer, tcp_garbage
from tests.crash.history import History

pytestmark = [pytest.mark.crash, pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(900)]

FRAMES = 100_000
FRAMES_WARM_UP = 20_000  # then allocators and tables have the size that they keep
MESSAGES_PER_QUESTION = 60  # after a hundred in a row that make no sense a broker stops listening for a while
MESSAGES_PER_PEER = 2_000
TCP_CONNECTIONS = 300
GROWTH_MAX = 30 << 20
OURS = {"p": "produce", "t": "train", "w": "work"}
ANSWER_MS = 5_000
STRANGER = "stranger-"


class Stranger:
    """A peer that sends nonsense, and now and then a question that the broker has to answer all the same."""

    def __init__(self, address: str, name: str, fuzzer: Fuzzer) -> None:
        self.name = name
        self.answers: Counter[str] = Counter()
        self.messages = 0
        self.frames = 0
        self.dropped = False
        self._messages = fuzzer.messages(name)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.connect(address)

    def talk(self, messages: int) -> None:
        """Send so many; ends early when the broker has had enough of this peer."""
        questions = itertools.count(1 << 40)
        while self.messages < messages and not self.dropped:
            for message in itertools.islice(self._messages, MESSAGES_PER_QUESTION):
                self._socket.send_multipart(message)
                self.frames += len(message)
                self.messages += 1
            self._ask(next(questions))
        self._context.destroy(linger=0)

    def _ask(self, request: int) -> None:
        """Ask, and count what comes until the answer: it proves that all before it was read."""
        self._socket.send_multipart(wire.encode(m.StatusQuery(), request=request, producer=self.name))
        while self._socket.poll(ANSWER_MS):
            answers = [a for a in wire.split(wire.decode(self._socket.recv_multipart())) if isinstance(a, wire.Message)]
            self.answers.update(type(answer.body).__name__ for answer in answers)
            if any(answer.header.request == request for answer in answers):
                return
        self.dropped = True


async def test_100_000_frames_of_nonsense_harm_nobody(tmp_path: Path) -> None:
    history = History()
    fuzzer = Fuzzer(seed=11)
    with BrokerLives(tmp_path / "log") as lives:
        async with calling(lives.address, history.on_event) as callers:
            for name, role in OURS.items():
                await callers.add(role, name)
            await history.wait_until(lambda: all(history.acks_of[name] for name in OURS))
            strangers: list[Stranger] = []

            async def talk(frames: int) -> None:
                enough = sum(stranger.frames for stranger in strangers) + frames
                while sum(stranger.frames for stranger in strangers) < enough:
                    strangers.append(Stranger(lives.address, f"{STRANGER}{len(strangers)}", fuzzer))
                    await anyio.to_thread.run_sync(strangers[-1].talk, MESSAGES_PER_PEER)
                    await history.wait_more_acks(1, "p")

            await talk(FRAMES_WARM_UP)
            before = private_bytes(lives.pid)
            with ExitStack() as connections:
                dice = random.Random(12)
                for _ in range(TCP_CONNECTIONS):
                    connection: socket.socket = tcp_garbage(lives.address, dice)
                    connections.enter_context(connection)
                await talk(FRAMES)
            for name in OURS:
                await history.wait_more_acks(10, name)
            growth = private_bytes(lives.pid) - before
            await callers.finish("p", "t")
            await callers.finish("w")
        await anyio.to_thread.run_sync(lives.kill)

    answers = sum((stranger.answers for stranger in strangers), Counter[str]())
    assert answers["Error"] > sum(stranger.messages for stranger in strangers) // 2, answers
    assert growth < GROWTH_MAX, f"{growth >> 20} MiB more than before"
    assert sum(stranger.dropped for stranger in strangers) < len(strangers) // 2
    history.check(tmp_path / "log", strangers=(STRANGER, SOMEBODY_ELSE))


def private_bytes(pid: int) -> int:
    """Memory of the process that is not a mapped file: the log's pages belong to the page cache."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc: this test needs Linux")
