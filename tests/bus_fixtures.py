"""What tests of the bus share: a broker inside the test's event loop, a broker in a process of its own, and spans.

The broker in the loop is the real one, with a real socket and a real log; only the process is shared. LMDB refuses to
open an environment twice in one process, so a test that reads the log beside a live broker takes the process.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType

import anyio
import zmq

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker.server import serve_broker
from lightning_bus.config import BrokerSection
from lightning_bus.spans import Span

ROOT = Path(__file__).resolve().parent.parent
SECRET = b"s" * 32
PATIENCE_S = 60.0  # with what takes no time, on a machine that stands still for a while
NOWHERE = "tcp://127.0.0.1:9"  # the discard port: nobody listens
_numbers = itertools.count(1)

_PROCESS = """
import sys
from pathlib import Path

import anyio

from lightning_bus.broker.server import serve_broker
from lightning_bus.config import BrokerSection

bind, log, lease_s, max_attempts = sys.argv[1:]
section = BrokerSection(bind=bind, lease_s=float(lease_s), max_attempts=int(max_attempts), drain_s=0.0)
anyio.run(lambda: serve_broker(section, Path(log), b"s" * 32, started=lambda address: print(address, flush=True)))
"""


def span(name: str = "step", rollout_id: str = "", attempt: int = 0, **attributes: object) -> Span:
    """Return a span that no other call returns."""
    number = next(_numbers)
    return Span(
        number.to_bytes(8, "big"), b"t" * 16, None, name, number, number + 1, dict(attributes), rollout_id, attempt
    )


@asynccontextmanager
async def broker(
    log_dir: Path, *, bind: str = "tcp://127.0.0.1:*", lease_s: float = PATIENCE_S, max_attempts: int = 5
) -> AsyncGenerator[str]:
    """Run a broker in this event loop and give its address; when the context ends it has stopped and closed its log."""
    section = BrokerSection(bind=bind, lease_s=lease_s, max_attempts=max_attempts, drain_s=0.0)
    address: list[str] = []
    up = anyio.Event()

    def started(bound: str) -> None:
        address.append(bound)
        up.set()

    async def serve() -> None:
        await serve_broker(section, log_dir, SECRET, started=started)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        await up.wait()
        yield address[0]
        tasks.cancel_scope.cancel()


class BrokerProcess:
    """A broker in a process of its own, which can be killed. Starting it again goes on at the same address and log."""

    def __init__(self, log_dir: Path, *, lease_s: float = PATIENCE_S, max_attempts: int = 5) -> None:
        self.log_dir = log_dir
        self.address = "tcp://127.0.0.1:*"
        self._arguments = [str(lease_s), str(max_attempts)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Return the address once the broker is bound to it."""
        command = [sys.executable, "-c", _PROCESS, self.address, str(self.log_dir), *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout is not None
        address = self._process.stdout.readline().strip()
        assert address, "the broker ended before it was bound"
        self.address = address
        return address

    def anonymous_mb(self) -> float:
        """Resident memory beyond mapped files, so beyond the log."""
        assert self._process is not None
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> BrokerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class RawPeer:
    """A DEALER that speaks frames, to say what no client of ours would say."""

    def __init__(self, address: str, name: str = "raw") -> None:
        self.name = name
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.connect(address)
        self.inbox: list[wire.Message] = []  # came in one message with what was received

    def send(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames)

    async def ask_frames(self, frames: list[bytes]) -> wire.Message:
        """Send these frames and return the next message that comes back."""
        self.send(frames)
        return await self.receive()

    async def ask(self, body: m.Body, blobs: list[bytes] | None = None, **header: int) -> wire.Message:
        """Send a body under this peer's name and return the next message that comes back."""
        return await self.ask_frames(wire.encode(body, blobs or [], producer=self.name, **header))  # pyright: ignore[reportArgumentType]

    async def receive(self) -> wire.Message:
        """Return the next message, out of its bundle if it came in one."""

        def wait() -> list[bytes]:
            assert self._socket.poll(PATIENCE_S * 1e3), f"no answer within {PATIENCE_S} s"
            return self._socket.recv_multipart()

        while not self.inbox:
            for message in wire.split(wire.decode(await anyio.to_thread.run_sync(wait))):
                assert isinstance(message, wire.Message)
                self.inbox.append(message)
        return self.inbox.pop(0)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)
