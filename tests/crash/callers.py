"""Clients in processes of their own, which say on stdout what the broker told them, one JSON array a line.

    python -m tests.crash.callers produce|train|work|hold ADDRESS NAME

They go on until their input ends, then finish what they began. `Callers` starts them and hands on what they say.

    append WRITER NUMBER            acknowledged
    submit IDS                      accepted
    step | last ID ATTEMPT SPAN     a span of an attempt was acknowledged: alone, or with the attempt's DONE
    done | fenced ID ATTEMPT        its end was accepted, or refused
    hold ID ATTEMPT                 leased, and nothing is done about it until the input ends
    late append|done ID ATTEMPT WHAT    what then came of it: "kept", or the name of the error
    read OFFSET NEXT DIGEST         records were read
    cursor OFFSET                   the cursor is there
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import Process

from lightning_bus import Client, Status, Submission, decode_event
from lightning_bus import messages as m
from lightning_bus.errors import FencedError
from lightning_bus.log.codec import encode_record
from lightning_bus.records import Kind
from lightning_bus.spans import Span
from tests.bus_fixtures import ROOT

WRITERS = 3  # of a producer: their spans travel together
OPEN_MAX = 24  # rollouts of a trainer that have not ended
FETCH_WAIT_S = 0.2
FAIL_EVERY = 9  # attempts: then the worker reports a failure
SLOTS = 4
HELD = 6

Event = list[object]


def span(name: str, rollout_id: str = "", attempt: int = 0) -> Span:
    """Return the span of this name: its id follows from it, in whatever process."""
    span_id = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return Span(span_id, b"t" * 16, None, name, 1, 2, {}, rollout_id, attempt)


# -- here: starting them


class Callers:
    """Processes that call one broker. `on_event` gets what they say, in the order that each of them says it."""

    def __init__(self, address: str, on_event: Callable[[str, Event], None]) -> None:
        self.processes: dict[str, Process] = {}
        self._address = address
        self._on_event = on_event
        self._streams = anyio.create_task_group()
        self._ending = False

    async def add(self, role: str, name: str, address: str = "") -> Process:
        """Start a process. It calls the broker at `address`, which may be a proxy's."""
        command = [sys.executable, "-m", "tests.crash.callers", role, address or self._address, name]
        process = await anyio.open_process(command, cwd=ROOT, stderr=None)
        self.processes[name] = process
        self._streams.start_soon(self._listen, name, process)
        return process

    async def finish(self, *roles: str) -> None:
        """Let those whose names begin so finish what they began, and wait until they have ended."""
        chosen = [process for name, process in self.processes.items() if name.startswith(roles)]
        for process in chosen:
            assert process.stdin is not None
            await process.stdin.aclose()
        for process in chosen:
            await process.wait()

    async def _listen(self, name: str, process: Process) -> None:
        assert process.stdout is not None
        rest = b""
        async for chunk in process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._on_event(name, json.loads(line))
        assert await process.wait() == 0 or self._ending, f"client {name} failed; what it raised is above"

    def _end_all(self) -> None:
        self._ending = True
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()


@asynccontextmanager
async def calling(address: str, on_event: Callable[[str, Event], None]) -> AsyncIterator[Callers]:
    """Give Callers whose processes end with the context."""
    callers = Callers(address, on_event)
    async with callers._streams:
        try:
            yield callers
        finally:
            callers._end_all()
            with anyio.CancelScope(shield=True):
                for process in callers.processes.values():
                    await process.aclose()


# -- there: what they do


async def produce(bus: Client, name: str, stop: anyio.Event) -> None:
    async def write(writer: str) -> None:
        number = 0
        while not stop.is_set():
            await bus.append("", 0, [span(f"{writer} {number}")])
            say("append", writer, number)
            number += 1

    async with anyio.create_task_group() as tasks:
        for writer in range(WRITERS):
            tasks.start_soon(write, f"{name}w{writer}")


async def train(bus: Client, name: str, stop: anyio.Event) -> None:
    """Submit, read the log, move a cursor; until stopped, and then until everything submitted has ended."""
    submitted = 0
    wanted: set[str] = set()
    room = anyio.Event()

    async def submit() -> None:
        nonlocal submitted, room
        while not stop.is_set():
            if len(wanted) >= OPEN_MAX:
                room = anyio.Event()
                await room.wait()
                continue
            ids = [f"{name}-{submitted + i}" for i in range(4)]
            wanted.update(ids)
            await bus.submit([Submission(rollout_id, b"task", group=name, max_attempts=1000) for rollout_id in ids])
            say("submit", ids)
            submitted += len(ids)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(submit)
        offset = await bus.cursor(name, 0)
        while not stop.is_set() or wanted:
            records, next_offset, _ = await bus.fetch(offset, wait_s=FETCH_WAIT_S)
            if not records:
                continue
            assert [record.offset for record in records] == list(range(offset, next_offset)), "records were skipped"
            say("read", offset, next_offset, digest([encode_record(record) for record in records]))
            offset = await bus.cursor(name, next_offset)
            say("cursor", offset)
            ended = [
                record.rollout_id
                for record in records
                if record.kind is Kind.ROLLOUT and Status(decode_event(record).status).terminal
            ]
            wanted.difference_update(ended)
            room.set()
    assert not wanted


async def work(bus: Client, name: str, stop: anyio.Event) -> None:
    async with bus.lease(SLOTS) as leases, anyio.create_task_group() as tasks:

        async def stop_leasing() -> None:
            await stop.wait()
            leases.stop()

        tasks.start_soon(stop_leasing)
        taken = 0
        async for task in leases:
            taken += 1
            key = task.rollout_id, task.attempt
            step, last = f"{key} {name} step", f"{key} {name} last"
            try:
                await bus.append(*key, [span(step, *key)])
                say("step", *key, step)
                if taken % FAIL_EVERY == 0:
                    await leases.fail(task, "the tool was away")
                    continue
                await leases.done(task, 1.0, [span(last, *key)])
            except FencedError:
                say("fenced", *key)
                continue
            say("last", *key, last)
            say("done", *key)


async def hold(bus: Client, name: str, stop: anyio.Event) -> None:
    """Take HELD rollouts, do nothing about them until told, then go on as if no time had passed."""
    async with bus.lease(HELD) as leases:
        held: dict[str, m.Task] = {}
        while len(held) < HELD:
            task = await anext(leases)
            step = f"{task.rollout_id} {task.attempt} {name} step"
            with suppress(FencedError):
                await bus.append(task.rollout_id, task.attempt, [span(step, task.rollout_id, task.attempt)])
                say("step", task.rollout_id, task.attempt, step)
                held[task.rollout_id] = task
                say("hold", task.rollout_id, task.attempt)
        await stop.wait()
        for task in held.values():
            key = task.rollout_id, task.attempt
            for what, call in [
                ("append", bus.append(*key, [span(f"{key} {name} late step", *key)])),
                ("done", leases.done(task, 0.0, [span(f"{key} {name} late last", *key)])),
            ]:
                try:
                    await call
                except FencedError as exc:
                    say("late", what, *key, type(exc).__name__)
                else:
                    say("late", what, *key, "kept")


ROLES: dict[str, Callable[[Client, str, anyio.Event], Awaitable[None]]] = {
    "produce": produce,
    "train": train,
    "work": work,
    "hold": hold,
}


def digest(blobs: list[bytes]) -> str:
    return hashlib.blake2b(b"".join(blobs), digest_size=8).hexdigest()


def say(*event: object) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


async def main(role: str, address: str, name: str) -> None:
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:

        async def wait_for_end_of_input() -> None:
            await anyio.wait_readable(sys.stdin)
            stop.set()

        tasks.start_soon(wait_for_end_of_input)
        async with Client(address, role=role) as bus:
            await ROLES[role](bus, name, stop)
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
