"""Complete groups from a log: the same ones in the same order, wherever a reader was stopped and went on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bus.adapters import (
    Cursor,
    FinishedRollout,
    Groups,
    RewardsSection,
    ScoredGroup,
    TransitionStream,
    scored,
)
from lightning_bus.config import CreditSection
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import encode_event
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Kind, Record, RolloutEvent
from lightning_bus.spans import encode_spans
from tests.golden import multi_agent
from tests.recorded_run import write_run

SIZE = 3
CALL = multi_agent.load()[0].spans[0]
TRAIN = {"phase": "train"}

Taken = list[tuple[str, tuple[str, ...]]]


@dataclass
class Tape:
    """A log that ends at `end`; read over the bus it ends there too, where a real one would wait."""

    all: Sequence[Record]
    end: int

    def records(self, offset: int | None = None) -> Iterator[Record]:
        yield from self.all[offset or 0 : self.end]

    async def follow(self, offset: int = 0) -> AsyncGenerator[Record]:
        for record in self.all[offset : self.end]:
            yield record


def steps_of(rollout_id: str, group: str, attempts: int, status: Status, *, train: bool) -> list[Record]:
    """Return a rollout's life: submitted, leased, a call in each attempt, ended."""

    def event(what: str, status: str, attempt: int) -> Record:
        labels = TRAIN if train else {"phase": "eval"}
        body = encode_event(RolloutEvent(what, status, group=group, reward=1.0, labels=labels))
        return Record(0, Kind.ROLLOUT, "", 0, 0, 0, rollout_id, attempt, 0, 0, body)

    steps = [event("submit", "queued", 0)]
    for attempt in range(1, attempts + 1):
        call = msgspec.structs.replace(CALL, rollout_id=rollout_id, attempt=attempt)
        spans = Record(0, Kind.SPANS, "gw", 1, 1, 0, rollout_id, attempt, 1, 0, encode_spans([call]))
        steps += [event("lease", "leased", attempt), spans]
        steps.append(event("expire", "queued", attempt) if attempt < attempts else event("end", status, attempt))
    return steps


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """Any interleaving of the lives of some groups, one of them short of a rollout; a few singles; and evaluations."""
    members = [(f"g{group}-{n}", f"g{group}", True) for group in range(draw(st.integers(1, 4))) for n in range(SIZE)]
    members += [("short-0", "short", True)] * draw(st.integers(0, 1))
    members += [(f"single-{n}", "", True) for n in range(draw(st.integers(0, 2)))]
    members += [(f"eval-{n}", f"eval-{n}", False) for n in range(draw(st.integers(0, 2)))]
    ends = st.sampled_from([Status.SUCCEEDED, Status.FAILED, Status.CANCELLED])
    lives = [
        steps_of(rollout_id, group, draw(st.integers(1, 2)), draw(ends), train=train)
        for rollout_id, group, train in members
    ]
    order = draw(st.permutations([at for at, life in enumerate(lives) for _ in life]))
    left = [iter(life) for life in lives]
    return [next(left[at])._replace(offset=offset) for offset, at in enumerate(order)]


def groups_of(records: Sequence[Record]) -> Taken:
    """The obvious reference: read the whole log once."""
    ended: dict[str, list[str]] = {}
    found: Taken = []
    for record in records:
        if record.kind is not Kind.ROLLOUT:
            continue
        told = msgspec.msgpack.decode(record.body, type=RolloutEvent)
        if Status(told.status).terminal and told.labels == TRAIN:
            name = told.group or record.rollout_id
            ended.setdefault(name, []).append(record.rollout_id)
            if len(ended[name]) == SIZE or not told.group:
                found.append((name, tuple(sorted(ended[name]))))
    return found


def names(group: ScoredGroup) -> tuple[str, tuple[str, ...]]:
    return group.name, tuple(rollout.rollout_id for rollout in group.rollouts)


def saved(stream: TransitionStream) -> Cursor:
    """Return the cursor after a trip through a checkpoint."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(stream.cursor), type=Cursor)


lives = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.booleans()), max_size=4)


@settings(max_examples=100)
@given(records=logs(), lives=lives)
def test_stopped_anywhere_and_gone_on_the_groups_are_those_of_one_reading(
    records: list[Record], lives: list[tuple[float, int, bool]]
) -> None:
    async def live() -> Taken:
        taken: Taken = []
        cursor: Cursor | None = None
        shown = 0
        for share, count, asked in [*lives, (1.0, len(records), False)]:
            shown = max(shown, int(share * len(records)))
            tape = Tape(records, shown)
            stream = TransitionStream(group_size=SIZE, cursor=cursor, labels=TRAIN)
            if asked:
                async with aclosing(stream.follow(tape)) as groups:
                    for _ in range(count):
                        group = await anext(groups, None)
                        taken += [] if group is None else [names(group)]
            else:
                taken += map(names, islice(stream.read(tape), count))
            cursor = saved(stream)
        return taken

    assert anyio.run(live) == groups_of(records)


@settings(max_examples=50)
@given(records=logs(), ends=st.lists(st.floats(0, 1), max_size=3))
def test_a_stream_that_reads_again_goes_on_with_what_was_written_meanwhile(
    records: list[Record], ends: list[float]
) -> None:
    stream = TransitionStream(group_size=SIZE, labels=TRAIN)
    taken: Taken = []
    for end in sorted(int(share * len(records)) for share in ends) + [len(records)]:
        taken += map(names, stream.read(Tape(records, end)))
    assert taken == groups_of(records)


@settings(max_examples=50)
@given(records=logs())
def test_what_is_kept_is_what_is_unfinished(records: list[Record]) -> None:
    groups = Groups(size=SIZE, labels=TRAIN)
    for record in records:
        groups.feed(record)
    while groups.take() is not None:
        pass
    waiting = [record.offset for record in records if record.rollout_id == "short-0"][:1]
    assert groups.unfinished == len(waiting)
    cursor = groups.cursor
    assert cursor.offset == (waiting or [len(records)])[0]
    assert all(first >= cursor.offset for first in cursor.consumed.values())
    assert bool(cursor.consumed) <= bool(waiting), "nothing is remembered where nothing is carried over"


def test_groups_that_nobody_took_yet_are_read_again() -> None:
    lives = [steps_of(f"g-{n}", "g", 1, Status.SUCCEEDED, train=True) for n in range(SIZE)]
    records = [record._replace(offset=at) for at, record in enumerate(record for life in lives for record in life)]
    groups = Groups(size=SIZE)
    for record in records:
        groups.feed(record)
    assert (groups.complete, groups.cursor) == (1, Cursor(0))
    assert groups.peek() is groups.take()
    assert groups.cursor == Cursor(len(records))


# -- what a stream promises whoever writes the log, and whoever is handed its groups


def two_groups() -> list[Record]:
    """Two groups, each complete with the end of its last rollout, and one record after them."""
    lives = [steps_of(f"{name}-{n}", name, 1, Status.SUCCEEDED, train=True) for name in ("a", "b") for n in range(SIZE)]
    lives.append(steps_of("c-0", "c", 1, Status.SUCCEEDED, train=True)[:1])
    return [record._replace(offset=at) for at, record in enumerate(record for life in lives for record in life)]


def test_a_group_is_handed_out_before_what_comes_after_it_is_read() -> None:
    records = two_groups()
    first_ends = len(records) // 2

    async def live() -> None:
        stream = TransitionStream(group_size=SIZE)
        async with aclosing(stream.follow(Tape(records, len(records)))) as groups:
            assert (await anext(groups)).name == "a"
            assert stream.groups.next_offset == first_ends

    stream = TransitionStream(group_size=SIZE)
    assert next(stream.read(Tape(records, len(records)))).name == "a"
    assert (stream.groups.next_offset, stream.groups.unfinished) == (first_ends, 0)
    anyio.run(live)


def test_a_stream_that_stands_still_holds_up_nobody_who_writes(tmp_path: Path) -> None:
    records = two_groups()
    half = len(records) // 2
    with closing(LogWriter(tmp_path, map_bytes_max=1 << 26)) as writer:
        writer.commit(records[: half + 1])
        with LogReader(tmp_path) as reader:
            groups = TransitionStream(group_size=SIZE).read(reader)
            assert next(groups).name == "a"
            # An open read transaction would keep every page of the log from being used again.
            told = reader._segments.newest.env.readers()  # pyright: ignore[reportPrivateUsage]
            assert all(line.split()[2] == "-" for line in told.splitlines()[1:]), told
            writer.commit(records[half + 1 :])
            assert [group.name for group in groups] == ["b"], "and it goes on with what was written meanwhile"


def test_after_a_restart_the_next_groups_are_the_same_to_the_bit(tmp_path: Path) -> None:
    rollouts, log = recorded(tmp_path)
    size = len([one for one in rollouts if one.group == rollouts[0].group])

    def learnt(group: ScoredGroup) -> bytes:
        rows = [row for rollout in group.rollouts for row in rollout.rows]
        arrays = [(row.token_ids, row.trained, row.logprobs, row.temperatures) for row in rows]
        told = [
            (one.rollout_id, one.reward, one.total, [t.span_id for t in one.transitions.turns])
            for one in group.rollouts
            if one.transitions
        ]
        return repr(told).encode() + b"".join(array.tobytes() for each in arrays for array in each)

    with LogReader(log) as reader:
        unbroken = list(map(learnt, TransitionStream(group_size=size).read(reader)))
        assert len(set(unbroken)) == len(unbroken) > 1
        for taken in range(len(unbroken)):
            before = TransitionStream(group_size=size)
            assert list(map(learnt, islice(before.read(reader), taken))) == unbroken[:taken]
            after = TransitionStream(group_size=size, cursor=saved(before))
            assert list(map(learnt, after.read(reader))) == unbroken[taken:]


# -- scores -------------------------------------------------------------------------------------------------------------


def recorded(tmp_path: Path) -> tuple[list[FinishedRollout], Path]:
    rollouts = multi_agent.load()
    return rollouts, write_run(tmp_path / "run", rollouts) / "log"


def test_a_group_comes_with_what_its_rollouts_hold_to_learn_from(tmp_path: Path) -> None:
    rollouts, log = recorded(tmp_path)
    group_size = len([one for one in rollouts if one.group == rollouts[0].group])
    credit, rewards = CreditSection(agents=multi_agent.TRAINED), RewardsSection(emitted="final")
    with LogReader(log) as reader:
        stream = TransitionStream(group_size=group_size, credit=credit, rewards=rewards, policy="policy")
        found = list(stream.read(reader))
        assert stream.cursor == Cursor(reader.end_offset)
    assert [group.name for group in found] == sorted({one.group for one in rollouts})
    for group in found:
        finished = sorted((one for one in rollouts if one.group == group.name), key=lambda one: one.rollout_id)
        expected, dropped = scored(finished, credit, rewards, policy="policy")
        assert group.dropped == dropped
        for one, other in zip(group.rollouts, expected, strict=True):
            assert (one.rollout_id, one.reward, one.total) == (other.rollout_id, other.reward, other.total)
            assert [row.span_ids for row in one.rows] == [row.span_ids for row in other.rows]
            assert [row.token_ids.tolist() for row in one.rows] == [row.token_ids.tolist() for row in other.rows]


def test_a_judge_says_what_rollouts_earned_and_one_that_fails_loses_no_group(tmp_path: Path) -> None:
    rollouts, log = recorded(tmp_path)
    with LogReader(log) as reader:
        tape = Tape(list(reader.records()), reader.end_offset)
    stream = TransitionStream(group_size=len([one for one in rollouts if one.group == rollouts[0].group]))

    async def broken(given: Sequence[FinishedRollout]) -> Sequence[FinishedRollout]:
        raise RuntimeError("no judge today")

    async def judge(given: Sequence[FinishedRollout]) -> Sequence[FinishedRollout]:
        return [replace(one, judged=0.25) for one in given]

    async def live() -> list[ScoredGroup]:
        async with aclosing(stream.follow(tape, broken)) as groups:
            with pytest.raises(RuntimeError, match="no judge today"):
                await anext(groups)
        return [group async for group in stream.follow(tape, judge)]

    found = anyio.run(live)
    assert [group.name for group in found] == sorted({one.group for one in rollouts})
    assert {one.reward for group in found for one in group.rollouts} == {0.25, None}, "what failed has none"
