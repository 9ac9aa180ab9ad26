"""What runs beside a trainer that runs in this process: daemons, an agent that only this process knows, a progress line.

What always holds: a process that is started here ends with the context, and with this process, however that ends, for
its stdin is a lifeline.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx
import msgspec
from anyio.from_thread import start_blocking_portal

from lightning_bus import KEY_ENV, LIFELINE, BrokenError, Client, RunFile, adopt_key, monotonic_s
from trainer.dev import agent_entry

T = TypeVar("T")
Agent = Callable[..., Any] | str

# The key, and what torchrun tells a process about its place among those that train.
OURS = frozenset({KEY_ENV, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})

READY_LIMIT_S = 600.0  # an engine may load a large model first
POLL_S = 0.2
END_LIMIT_S = 60.0
PORTS = range(10_000, 32_768)  # below those that systems give to whoever asks for any
QUIET_S = 15.0  # an evaluation, or an engine that loads, says nothing in metrics.jsonl for minutes


@contextmanager
def holding_key(role: str, key: Path | None, file: RunFile) -> Generator[None]:
    """Connect with this key, or with the run's for the role where it has keys, while the context lasts."""
    before = os.environ.get(KEY_ENV)
    adopt_key(role, key, file)
    try:
        yield
    finally:
        os.environ.pop(KEY_ENV, None)
        if before is not None:
            os.environ[KEY_ENV] = before


@contextmanager
def up(directory: Path) -> Generator[subprocess.Popen[bytes]]:
    """Run broker, gateway, engine and workers while the context lasts; they end with this process, however it ends."""
    with _daemon(["up", str(directory), "--no-trainer"], directory / "logs" / "up.log") as process:
        yield process


@contextmanager
def worker(file: RunFile, agent: str, bus: str, gateway: str, key: str | Path | None) -> Generator[None]:
    words = ["worker", agent, "--run", str(file.directory / "run.toml"), "--processes", "1", "--bus", bus]
    words += ["--gateway", gateway, *(["--key", str(key)] if key else [])]
    with _daemon(words, file.directory / "logs" / "worker.log"):
        yield


@contextmanager
def _daemon(words: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_bus.cli", *words],
            stdin=subprocess.PIPE,  # a lifeline: its end tells that we are gone
            stdout=output,
            stderr=output,
            # Each daemon finds the key of its own role, ours is none of theirs; and it is no rank of this trainer.
            env={name: value for name, value in os.environ.items() if name not in OURS} | {LIFELINE: "1"},
            start_new_session=True,  # a Ctrl-C is ours; we end what we started
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


async def wait_ready(
    bus: str, gateways: Sequence[str], engines: Sequence[str], daemon: subprocess.Popen[bytes] | None
) -> None:
    """Return once everything answers. Raises BrokenError after READY_LIMIT_S, and when what we started has ended."""
    until_s = monotonic_s() + READY_LIMIT_S
    waiting = [f"{url}/health" for url in (*gateways, *engines)]
    async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
        while waiting:
            _check_alive(daemon)
            if monotonic_s() > until_s:
                raise BrokenError(f"{waiting[0]} did not answer within {READY_LIMIT_S:g} s. Is it running?")
            try:
                (await http.get(waiting[0])).raise_for_status()
                del waiting[0]
            except httpx.HTTPError:
                await anyio.sleep(POLL_S)
    async with Client(bus, role="trainer", limit_s=30.0) as client:
        await client.status()


async def fail_with(daemon: subprocess.Popen[bytes]) -> None:
    while True:
        _check_alive(daemon)
        await anyio.sleep(POLL_S)


def _check_alive(daemon: subprocess.Popen[bytes] | None) -> None:
    if daemon is not None and daemon.poll() is not None:
        log = Path(daemon.args[4]) / "logs" / "up.log"  # pyright: ignore[reportArgumentType, reportIndexIssue] - a list
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise BrokenError(f"what was started for this run has ended (exit code {daemon.returncode}):\n{tail}")


def name_of(agent: Callable[..., Any]) -> str:
    """Return "module:function" under which another process finds this very function, or "" where none does."""
    module, path = getattr(agent, "__module__", ""), getattr(agent, "__qualname__", "")
    found: Any = sys.modules.get(module)
    if module in ("", "__main__") or "<" in path or not path or getattr(found, "__file__", None) is None:
        return ""
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"{module}:{path}" if found is agent else ""


async def run_here(agent: Agent, bus: str, gateway: str, file: RunFile, n_workers: int) -> None:
    """Run the agent in an event loop and threads of its own, so that a step of training does not hold it up."""
    worker: Any = msgspec.to_builtins(file.sections["worker"])
    ending = threading.Event()

    async def until_ending() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: agent_entry("run")(
                    agent,
                    bus_address=bus,
                    gateway_url=gateway,
                    concurrency=n_workers * worker["concurrency"],
                    attempt_limit_s=worker["attempt_limit_s"],
                )
            )
            while not ending.is_set():  # noqa: ASYNC110 - set by another thread
                await anyio.sleep(POLL_S)
            tasks.cancel_scope.cancel()

    try:
        await anyio.to_thread.run_sync(anyio.run, until_ending, abandon_on_cancel=True)
    finally:
        ending.set()


class Watch:
    """Tells each new line of metrics.jsonl in words, and after QUIET_S without one what the daemons say of themselves."""

    def __init__(self, directory: Path, say: Callable[[str], None], now_s: Callable[[], float] = monotonic_s) -> None:
        self._path, self._daemons = directory / "metrics.jsonl", directory / "logs" / "up.log"
        self._say = say
        self._now_s = now_s
        self._told, self._heard = len(_whole_lines(self._path)), len(_whole_lines(self._daemons))  # in earlier lives
        self._told_s = now_s()

    async def run(self) -> None:
        while True:
            self.look()
            await anyio.sleep(1.0)

    def look(self) -> None:
        lines = _whole_lines(self._path)
        for line in lines[self._told :]:
            self._say(_in_words(json.loads(line)))
        if len(lines) > self._told:
            self._told, self._told_s = len(lines), self._now_s()
        elif self._now_s() - self._told_s >= QUIET_S:
            said = _whole_lines(self._daemons)
            if len(said) > self._heard:
                self._say(f"     ... {said[-1]}")
            self._heard, self._told_s = len(said), self._now_s()


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that may not be there, but for one that is half written."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []


def _in_words(line: Mapping[str, Any]) -> str:
    said = f"{line['phase']:>8} step {line['step']:<4} version {line['version']:<4}"
    keys = ("reward_mean", "held_out_success", "loss", "grad_norm", "staleness_mean", "tokens_per_s", "idle_share")
    said += "".join(f"  {name} {line[name]:.3g}" for name in keys if name in line)
    if line.get("rows") == 0:  # the first thing that goes wrong for a newcomer, and nothing else would say it
        reasons = ", ".join(f"{reason} {count}" for reason, count in line["dropped"].items())
        said += f"  nothing to learn from, left out: {reasons or 'nothing, for there was nothing'}"
    return said


def run_to_end(main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` to its end, in a thread where an event loop already runs here: a notebook has one.

    Raises what it raises, out of the exception groups of task groups. Ctrl-C ends it in order first.
    """
    try:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return anyio.run(main)
        with start_blocking_portal() as portal:
            running = portal.start_task_soon(main)
            try:
                return running.result()
            except KeyboardInterrupt:
                running.cancel()
                raise
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now, and that nobody gets by chance before they are bound.

    Raises BrokenError when there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise BrokenError(f"of the ports {PORTS.start} to {PORTS.stop - 1} no {count} are free")
