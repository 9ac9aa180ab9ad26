"""The trainer's view of the log: groups in the log's order, and after any number of deaths the same next one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bus import AgentError, BrokenError, Client, RolloutEvent, Span, Status, Submission
from lightning_bus import spans as s
from lightning_bus.adapters import Cursor
from lightning_bus.log.codec import encode_event
from lightning_bus.records import Kind, Record
from tests.bus_fixtures import broker, span
from trainer.data.stream import EVAL, TEACHER, TRAIN, RolloutStream, submission

GROUP_SIZE = 2


class Tape:
    """A log that is shown up to `end`; whoever follows it waits there. Stands for the bus."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.end = 0
        self.read_to_end = anyio.Event()
        self._moved = anyio.Event()

    async def follow(self, offset: int) -> AsyncIterator[Record]:
        while True:
            while offset < self.end:
                yield self.records[offset]
                offset += 1
            self.read_to_end.set()
            await self._moved.wait()

    async def show(self, end: int) -> None:
        """Show the log up to `end`, and return when the follower has read it."""
        self.end, moved, self._moved = end, self._moved, anyio.Event()
        self.read_to_end = anyio.Event()
        moved.set()
        await self.read_to_end.wait()


@asynccontextmanager
async def following(bus: Any, state: dict[str, Any], limit_s: float = 20.0) -> AsyncIterator[RolloutStream]:
    stream = RolloutStream(bus, GROUP_SIZE, msgspec.convert(state, Cursor), limit_s)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.run)
        yield stream
        tasks.cancel_scope.cancel()


START: dict[str, Any] = {"offset": 0, "consumed": {}}


def event(offset: int, rollout_id: str, what: str, status: str, attempt: int, phase: str) -> Record:
    group = rollout_id.rpartition("-")[0]
    body = encode_event(RolloutEvent(what, status, group=group, labels={"phase": phase}))
    return Record(offset, Kind.ROLLOUT, "", 0, 0, 0, rollout_id, attempt, 0, 0, body)


def a_log(order: list[tuple[str, str]]) -> list[Record]:
    """Return the log of rollouts that take their three steps (submit, lease, end) in this order of (rollout, phase)."""
    steps = [("submit", "queued", 0), ("lease", "leased", 1), ("succeed", "succeeded", 1)]
    taken: dict[str, int] = {}
    records: list[Record] = []
    for rollout_id, phase in order:
        what, status, attempt = steps[taken.get(rollout_id, 0)]
        taken[rollout_id] = taken.get(rollout_id, 0) + 1
        records.append(event(len(records), rollout_id, what, status, attempt, phase))
    return records


def groups_as_completed(records: list[Record]) -> list[tuple[str, tuple[str, ...]]]:
    """The obvious reference: read the whole log once."""
    ended: dict[str, list[str]] = {}
    result: list[tuple[str, tuple[str, ...]]] = []
    for record in records:
        told = msgspec.msgpack.decode(record.body, type=RolloutEvent)
        if told.what == "succeed" and told.labels["phase"] == TRAIN:
            members = ended.setdefault(told.group, [])
            members.append(record.rollout_id)
            if len(members) == GROUP_SIZE:
                result.append((told.group, tuple(sorted(members))))
    return result


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    groups = draw(st.integers(1, 6))
    train = [(f"train-{group}-{member}", TRAIN) for group in range(groups) for member in range(GROUP_SIZE)]
    others = [(f"eval-{n}", EVAL) for n in range(draw(st.integers(0, 3)))]
    return a_log(draw(st.permutations(3 * [*train, *others])))


@settings(max_examples=60)
@given(logs(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), max_size=4))
def test_after_any_deaths_the_next_groups_are_those_of_an_unbroken_life(
    records: list[Record], lives: list[tuple[float, int]]
) -> None:
    expected = groups_as_completed(records)

    async def live() -> list[tuple[str, tuple[str, ...]]]:
        taken: list[tuple[str, tuple[str, ...]]] = []
        state: dict[str, Any] = START
        shown = 0
        for share, count in [*lives, (1.0, len(expected))]:
            tape = Tape(records)
            shown = max(shown, int(share * len(records)))
            async with following(tape, state) as stream:
                await tape.show(shown)
                complete = len(groups_as_completed(records[:shown])) - len(taken)
                groups = await stream.next_groups(min(count, complete))
                taken += [(group.name, tuple(one.rollout_id for one in group.rollouts)) for group in groups]
                state = msgspec.msgpack.decode(msgspec.msgpack.encode(stream.saved_state()))
        return taken

    assert anyio.run(live) == expected


@settings(max_examples=30)
@given(logs())
def test_what_is_saved_does_not_grow_with_what_was_consumed(records: list[Record]) -> None:
    async def consume_all() -> dict[str, Any]:
        tape = Tape(records)
        async with following(tape, START) as stream:
            await tape.show(len(records))
            await stream.next_groups(len(groups_as_completed(records)))
            return stream.saved_state()

    assert anyio.run(consume_all) == {"offset": len(records), "consumed": {}}


# -- over a real broker -------------------------------------------------------------------------------------------


def a_call(version: str) -> Span:
    """Return a model call that this weight version answered."""
    attributes = {
        s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: s.pack_ids([1]), s.RESPONSE_IDS: s.pack_ids([2]),
        s.LOGPROBS: s.pack_logprobs([-1.0]), s.WEIGHT_VERSIONS: [[version, 0, 1]], s.TEMPERATURE: 1.0,
    }  # fmt: skip
    return span("chat", **attributes)


async def carry_out(bus: Client, count: int, *, version: str = "0", error: str = "") -> None:
    """Play a worker: carry out so many attempts, with one model call each."""
    async with bus.lease(count) as leases:
        for _ in range(count):
            task = await leases.__anext__()
            call = msgspec.structs.replace(a_call(version), rollout_id=task.rollout_id, attempt=task.attempt)
            if error:
                await leases.fail(task, error, retryable=False, spans=[call])
            else:
                await leases.done(task, 1.0, [call])


def training(group: str) -> list[Submission]:
    return [submission(f"{group}-{member}", 7, TRAIN, group=group) for member in range(GROUP_SIZE)]


@pytest.mark.anyio
async def test_groups_come_back_with_their_spans_and_the_newest_version_is_seen(tmp_path: Path) -> None:
    async with broker(tmp_path) as address, Client(address) as trainer, Client(address, role="worker") as worker:
        async with following(trainer, START) as stream:
            await trainer.submit([*training("g-0"), submission("eval-0", 7, EVAL)])
            await carry_out(worker, 3, version="4")
            (group,) = await stream.next_groups(1)
            await stream.wait_version_called(4)
            (evaluated,) = await stream.wait_ended(["eval-0"])
            assert [one.rollout_id for one in group.rollouts] == ["g-0-0", "g-0-1"]
            assert all(len(one.spans) == 1 and one.reward == 1.0 for one in group.rollouts)
            assert evaluated.status is Status.SUCCEEDED


@pytest.mark.anyio
async def test_a_version_that_nobody_called_is_waited_for_and_then_told(tmp_path: Path) -> None:
    async with broker(tmp_path) as address, Client(address) as bus:
        async with following(bus, START, limit_s=0.05) as stream:
            await bus.submit(training("g-0"))
            with pytest.raises(BrokenError) as caught:
                await stream.wait_version_called(3)
    told = str(caught.value)
    for words in ("0.05 s", "weight version 3", "workers", "'queued': 2", "Start workers", "rollout_limit_s"):
        assert words in told


@pytest.mark.anyio
async def test_submitting_again_carries_nothing_out_twice(tmp_path: Path) -> None:
    teacher = [submission(f"teacher-{n}", 7, TEACHER) for n in range(2)]
    async with broker(tmp_path) as address, Client(address) as bus, Client(address, role="worker") as worker:
        for life in range(2):
            async with following(bus, START) as stream, anyio.create_task_group() as tasks:
                if life == 0:
                    tasks.start_soon(carry_out, worker, 2)
                ended = await stream.carry_out(teacher, tmp_path)
                assert [one.rollout_id for one in ended] == ["teacher-0", "teacher-1"]
        assert [(one.status, one.attempt) for one in await bus.query()] == 2 * [(Status.SUCCEEDED, 1)]


@pytest.mark.anyio
async def test_when_all_failed_it_is_told_with_the_reason_and_a_later_life_tries_anew(tmp_path: Path) -> None:
    evaluations = [submission(f"eval-{n}", 7, EVAL) for n in range(2)]
    async with broker(tmp_path) as address, Client(address) as bus, Client(address, role="worker") as worker:
        async with following(bus, START) as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: carry_out(worker, 2, error="Traceback …\nValueError: no tool"))
            with pytest.raises(AgentError) as caught:
                await stream.carry_out(evaluations, tmp_path)
        for words in ("all 2 rollouts of phase eval failed", "eval-0 after 1 attempts", "ValueError: no tool", "spans"):
            assert words in str(caught.value)
        async with following(bus, START) as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(carry_out, worker, 2)
            ended = await stream.carry_out(evaluations, tmp_path)
        assert [one.rollout_id for one in ended] == ["eval-0-again1", "eval-1-again1"]
