"""A broker that is killed, again and again, under load.

Real processes, real disk, SIGKILL in the middle of whatever the broker is doing. The clients never hear of it but as
latency; afterwards what they were told is compared with what the log holds.

Watched: everything acknowledged is in the log; no span is there twice; each producer's spans are in its order; each
rollout ended exactly once, the way its worker was told. Not watched: power loss, for the kernel outlives the kill.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from lightning_bus import Client, Status, Submission, decode_event, decode_spans
from lightning_bus.errors import FencedError
from lightning_bus.log.store import LogReader
from lightning_bus.log.verify import verify_log
from lightning_bus.records import Kind
from tests.bus_fixtures import BrokerProcess, span

pytestmark = [pytest.mark.crash, pytest.mark.anyio, pytest.mark.timeout(240)]

KILLS = 15
ACKS_PER_LIFE = 60  # about: then the broker is killed
PRODUCERS = 3
WRITERS_PER_PRODUCER = 4
WORKERS = 2


class History:
    """What the clients were told."""

    def __init__(self) -> None:
        self.acks = 0
        self.appended: dict[str, list[int]] = defaultdict(list)  # writer → numbers acknowledged, in order
        self.submitted: set[str] = set()
        self.done: dict[str, int] = {}  # rollout → the attempt whose DONE was accepted
        self.in_attempt: dict[tuple[str, int], list[str]] = defaultdict(list)  # spans acknowledged within an attempt
        self.over = False  # the killing is; finish what is left
        self.all_submitted = anyio.Event()  # nothing is added to `submitted` any more
        self._progress = anyio.Event()

    def ack(self) -> None:
        self.acks += 1
        self._progress.set()

    async def wait_acks(self, count: int) -> None:
        while self.acks < count:
            self._progress = anyio.Event()
            await self._progress.wait()


async def write(bus: Client, name: str, history: History) -> None:
    number = 0
    while not history.over:
        await bus.append("", 0, [span(f"{name} {number}")])
        history.appended[name].append(number)
        history.ack()
        number += 1


async def produce(address: str, producer: int, history: History) -> None:
    async with Client(address, role="producer") as bus, anyio.create_task_group() as tasks:
        for writer in range(WRITERS_PER_PRODUCER):
            tasks.start_soon(write, bus, f"p{producer}w{writer}", history)


async def submit(address: str, history: History) -> None:
    async with Client(address, role="trainer") as bus:
        while not history.over:
            ids = [f"r-{len(history.submitted) + i}" for i in range(3)]
            await bus.submit([Submission(rollout_id, b"task", max_attempts=100) for rollout_id in ids])
            history.submitted.update(ids)
            history.ack()
    history.all_submitted.set()


async def work(address: str, history: History, finished: anyio.Event) -> None:
    async with Client(address, role="worker") as bus, bus.lease(4) as leases, anyio.create_task_group() as tasks:

        async def stop_when_finished() -> None:
            await finished.wait()
            leases.stop()

        tasks.start_soon(stop_when_finished)
        async for task in leases:
            key = task.rollout_id, task.attempt
            try:
                await bus.append(*key, [span(f"{key} step")])
                history.in_attempt[key].append(f"{key} step")
                await leases.done(task, 1.0, [span(f"{key} last")])
            except FencedError:
                continue
            assert task.rollout_id not in history.done, "two attempts were told that they ended the rollout"
            history.in_attempt[key].append(f"{key} last")
            history.done[task.rollout_id] = task.attempt
            history.ack()


async def finish(address: str, history: History) -> None:
    """Wait until the workers have ended everything that was submitted."""
    await history.all_submitted.wait()
    async with Client(address) as bus:
        offset = ended = 0
        while ended < len(history.submitted):
            records, offset, _ = await bus.fetch(offset, wait_s=1.0)
            events = [decode_event(record) for record in records if record.kind is Kind.ROLLOUT]
            ended += sum(Status(event.status).terminal for event in events)


def check(log_dir: Path, history: History) -> None:
    with LogReader(log_dir) as reader:
        records = list(reader.records())
        rollouts = {rollout.submission.rollout_id: rollout for rollout in reader.rollouts()}
        report = verify_log(reader)
    assert report.proved, [check for check in report.checks if not check.proved]
    assert [record.offset for record in records] == list(range(len(records)))

    spans = [s for record in records if record.kind is Kind.SPANS for s in decode_spans(record.body)]
    assert max(Counter(s.span_id for s in spans).values()) == 1
    names = [s.name for s in spans]
    assert max(Counter(names).values()) == 1
    numbers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        if name.startswith("p"):
            writer, number = name.split(" ")
            numbers[writer].append(int(number))
    for writer, acked in history.appended.items():
        assert numbers[writer] == list(range(len(numbers[writer])))  # in order, without a hole
        assert len(numbers[writer]) >= len(acked) > 0
    assert {name for acked in history.in_attempt.values() for name in acked} <= set(names)

    assert set(rollouts) >= history.submitted
    for rollout_id in history.submitted:
        assert rollouts[rollout_id].status is Status.SUCCEEDED
    for rollout_id, attempt in history.done.items():
        assert rollouts[rollout_id].attempt == attempt


async def test_what_was_acknowledged_survives_every_kill_exactly_once(tmp_path: Path) -> None:
    history = History()
    dice = random.Random(20)
    with BrokerProcess(tmp_path / "log", lease_s=2.0) as process:
        finished = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for producer in range(PRODUCERS):
                tasks.start_soon(produce, process.address, producer, history)
            tasks.start_soon(submit, process.address, history)
            for _ in range(WORKERS):
                tasks.start_soon(work, process.address, history, finished)
            for _ in range(KILLS):
                await history.wait_acks(history.acks + dice.randint(ACKS_PER_LIFE // 2, ACKS_PER_LIFE * 3 // 2))
                process.kill()
                await anyio.to_thread.run_sync(process.start)
            history.over = True
            await finish(process.address, history)
            finished.set()
    check(tmp_path / "log", history)
    assert history.acks > KILLS * ACKS_PER_LIFE // 2
