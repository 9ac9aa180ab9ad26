"""A broker that lives many times: killed without warning, and back at the same address and log within milliseconds.

A process that has imported everything forks one broker after another, so that a life costs a fork and not the start of
an interpreter. What is forked is the real broker, with sockets and a log that it opened itself: the process it was
forked from has neither.

    python -m tests.crash.broker_lives LOG_DIR LEASE_S      (lines in: start, reap; lines out: pid N, bound A, gone)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import anyio

from lightning_bus.broker.server import serve_broker
from lightning_bus.config import BrokerSection
from tests.bus_fixtures import ROOT

SECRET = b"s" * 32


class BrokerLives:
    """One log, one address, and a broker there from `start` to `kill`."""

    def __init__(self, log_dir: Path, *, lease_s: float = 2.0) -> None:
        self.log_dir = log_dir
        self.address = ""
        self.pid = 0
        self.kills = 0
        command = [sys.executable, "-m", "tests.crash.broker_lives", str(log_dir), str(lease_s)]
        self._forker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def start(self, *, wait: bool = True) -> None:
        """Begin a life; return when the broker is bound, or at once."""
        self._say("start")
        self.pid = int(self._hear("pid"))
        if wait:
            self.address = self._hear("bound")

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed. Returns when the process is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._say("reap")
        self._hear("gone")
        self.kills += 1

    def __enter__(self) -> BrokerLives:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forker.communicate()  # end of input: it kills the broker and ends

    def _say(self, word: str) -> None:
        assert self._forker.stdin is not None
        self._forker.stdin.write(word + "\n")
        self._forker.stdin.flush()

    def _hear(self, word: str) -> str:
        """Return what follows the next line that begins with this word."""
        assert self._forker.stdout is not None
        for line in self._forker.stdout:
            said, _, rest = line.strip().partition(" ")
            if said == word:
                return rest
        raise AssertionError(f"the broker's process ended where {word!r} was due")


def main(log_dir: Path, lease_s: float) -> None:
    pid = 0
    bind = "tcp://127.0.0.1:*"
    reading, writing = os.pipe()  # the first life tells which port it got
    for line in sys.stdin:
        match line.strip():
            case "start":
                pid = os.fork()
                if pid == 0:
                    os.close(reading)
                    _live(log_dir, bind, lease_s, writing)
                _tell(f"pid {pid}")
                if bind.endswith("*"):
                    bind = os.read(reading, 200).decode()
                    assert bind, "the first life ended before it was bound"
            case "reap":
                os.waitpid(pid, 0)
                pid = 0
                _tell("gone")
            case word:
                raise SystemExit(f"{word!r} is neither start nor reap")
    if pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _live(log_dir: Path, bind: str, lease_s: float, writing: int) -> None:
    def started(address: str) -> None:
        os.write(writing, address.encode())
        _tell(f"bound {address}")

    section = BrokerSection(bind=bind, lease_s=lease_s)
    try:
        anyio.run(lambda: serve_broker(section, log_dir, SECRET, started=started))
    finally:
        os._exit(1)  # the loop that forked is not this process's to go on with


def _tell(line: str) -> None:
    os.write(1, (line + "\n").encode())  # whole, or a kill could leave half a line


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
