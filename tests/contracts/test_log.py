"""What every log promises (`log/base.py`), asked of each that we have: LMDB on a real disk, and memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus.errors import CallError, RetiredError
from lightning_bus.lifecycle import Status
from lightning_bus.log.base import Log
from lightning_bus.log.codec import decode_record, encode_record
from lightning_bus.log.memory import MemoryDisk, MemoryLog
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Delete, Kind, ProducerMark, Put, Record, Table, Write
from lightning_bus.resources import Resource

MAP_BYTES = 1 << 30
SEGMENT_BYTES = 64 << 10
BODY_BYTES = 10_000
encode = msgspec.msgpack.encode


class Opener:
    """Opens one log, again and again."""

    def __init__(self, kind: str, path: Path) -> None:
        self._path = path if kind == "lmdb" else None
        self._disk = MemoryDisk()
        self.log: Log = self.reopen()

    def reopen(self) -> Log:
        if self._path is None:
            self.log = MemoryLog(self._disk, segment_bytes=SEGMENT_BYTES)
        else:
            if hasattr(self, "log"):
                self.log.close()
            self.log = LogWriter(self._path, map_bytes_max=MAP_BYTES, segment_bytes=SEGMENT_BYTES)
        return self.log


@pytest.fixture(params=["lmdb", "memory"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(request.param, tmp_path / "log")
    yield opener
    opener.log.close()


@pytest.fixture
def log(opener: Opener) -> Log:
    return opener.log


def record(offset: int, body: bytes = b"body") -> Record:
    return Record(offset, Kind.SPANS, "p", 1, offset + 1, 0, "", 0, 1, 1000 + offset, body)


def append(log: Log, count: int, size: int = 4) -> None:
    """Commit that many records, each alone."""
    for _ in range(count):
        log.commit([record(log.end_offset, b"x" * size)])


def offsets(values: list[bytes]) -> list[int]:
    return [decode_record(value).offset for value in values]


def read_all(log: Log) -> list[int]:
    found: list[int] = []
    offset = log.first_offset
    while offset < log.end_offset:
        values, _ = log.read(offset, 1 << 20)
        found += offsets(values)
        offset += len(values)
    return found


def both(opener: Opener) -> Iterator[Log]:
    """Yield the log as it is open, and then opened again."""
    yield opener.log
    yield opener.reopen()


def several_segments(log: Log, count: int = 4) -> None:
    """Write until the log has that many segments, the newest with records in it."""
    while len(log.segments()) < count:
        append(log, 1, BODY_BYTES)


def test_a_new_log_is_empty(log: Log) -> None:
    assert (log.first_offset, log.end_offset) == (0, 0)
    assert log.read(0, 1000) == ([], 0)
    snapshot = log.load()
    assert (snapshot.next_offset, snapshot.rollouts, snapshot.producers, snapshot.cursors) == (0, [], {}, {})
    (only,) = log.segments()
    assert (only.first_offset, only.end_offset, only.newest_wall_ns) == (0, 0, 0)


def test_what_was_committed_is_there_when_it_is_opened_again(opener: Opener) -> None:
    rollout = m.Rollout(m.Submission("r-1", b"task"), Status.QUEUED)
    standing = m.Standing(Status.LEASED, 2, "w", None, "boom")
    mark = ProducerMark(3, 4, [1], b"nonce")
    resource = Resource("weights", 1, b"w")
    writes: list[Write] = [
        record(0), record(1),
        Put(Table.ROLLOUTS, b"r-1", encode(rollout)),
        Put(Table.STANDINGS, b"r-1", encode(standing)),
        Put(Table.PRODUCERS, b"p", encode(mark)),
        Put(Table.CURSORS, b"c", encode(1)),
        Put(Table.RESOURCES, b"weights\0\0\0\0\0\0\0\0\1", encode(resource)),
    ]  # fmt: skip
    opener.log.commit(writes)
    log = opener.reopen()
    snapshot = log.load()
    assert (snapshot.next_offset, snapshot.rollouts, snapshot.standings) == (2, [rollout], {"r-1": standing})
    assert (snapshot.producers, snapshot.cursors, snapshot.resources) == ({"p": mark}, {"c": 1}, [resource])
    assert log.read(0, 1000) == ([encode_record(record(0)), encode_record(record(1))], 2)


def test_of_several_writes_to_a_key_the_last_counts(log: Log) -> None:
    put, delete = Put(Table.CURSORS, b"a", encode(1)), Delete(Table.CURSORS, b"a")
    log.commit([put, Put(Table.CURSORS, b"a", encode(2)), Put(Table.CURSORS, b"b", encode(3))])
    assert log.load().cursors == {"a": 2, "b": 3}
    log.commit([put, delete])
    assert log.load().cursors == {"b": 3}
    log.commit([delete, put, Delete(Table.CURSORS, b"never there")])
    assert log.load().cursors == {"a": 1, "b": 3}


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_an_offset_that_is_not_due_is_refused_with_all_that_came_with_it(log: Log, offset: int) -> None:
    append(log, 2)
    with pytest.raises(AssertionError, match=f"record {offset} comes where 3 is due"):
        log.commit([record(2), Put(Table.CURSORS, b"c", encode(1)), record(offset, b"second")])
    assert (log.end_offset, log.load().cursors) == (2, {})
    assert read_all(log) == [0, 1]
    append(log, 1)
    assert read_all(log) == [0, 1, 2]


def test_a_read_takes_at_least_one_record_and_stops_at_its_size(log: Log) -> None:
    append(log, 10, 1000)
    assert (offsets(log.read(0, 1)[0]), log.read(0, 1)[1]) == ([0], 10)
    assert offsets(log.read(3, 3500)[0]) == [3, 4, 5]
    assert log.read(10, 1000) == ([], 10)
    assert log.read(99, 1000) == ([], 10)


def test_records_are_read_in_order_across_segments(opener: Opener) -> None:
    several_segments(opener.log)
    end = opener.log.end_offset
    assert len(opener.log.segments()) == 4
    for log in both(opener):
        assert read_all(log) == list(range(end))


def test_segments_tell_what_is_in_them(log: Log) -> None:
    several_segments(log)
    segments = log.segments()
    assert [s.first_offset for s in segments] == [0, *(s.end_offset for s in segments[:-1])]
    assert segments[-1].end_offset == log.end_offset
    assert all(s.bytes >= (s.end_offset - s.first_offset) * BODY_BYTES for s in segments)
    assert all(s.newest_wall_ns == 1000 + s.end_offset - 1 for s in segments)


def test_state_is_kept_across_segments(opener: Opener) -> None:
    opener.log.commit([Put(Table.CURSORS, b"before", encode(1)), Put(Table.CURSORS, b"gone", encode(1))])
    several_segments(opener.log, 2)
    opener.log.commit([Delete(Table.CURSORS, b"gone"), Put(Table.CURSORS, b"between", encode(2))])
    several_segments(opener.log, 4)
    for log in both(opener):
        assert log.load().cursors == {"before": 1, "between": 2}


def test_segments_are_dropped_whole_and_the_rest_goes_on(opener: Opener) -> None:
    log = opener.log
    several_segments(log)
    second, third = log.segments()[1:3]
    assert log.drop_before(second.end_offset - 1) == second.first_offset  # the second is still wanted
    assert log.first_offset == second.first_offset
    assert log.drop_before(third.end_offset) == third.end_offset
    end = log.end_offset
    for opened in both(opener):
        assert opened.first_offset == third.end_offset
        assert opened.load().next_offset == end
        assert read_all(opened) == list(range(third.end_offset, end))
        append(opened, 1)
        end += 1


def test_the_segment_being_written_is_never_dropped(log: Log) -> None:
    several_segments(log, 2)
    newest = log.segments()[-1]
    assert log.drop_before(10**9) == newest.first_offset
    assert log.segments() == [newest]
    assert log.drop_before(10**9) == newest.first_offset
    append(log, 1)
    assert read_all(log)[-1] == log.end_offset - 1


def test_who_reads_what_was_dropped_is_told_where_the_log_begins(log: Log) -> None:
    several_segments(log, 3)
    first = log.drop_before(log.segments()[0].end_offset)
    assert first > 0
    with pytest.raises(RetiredError, match=rf"records 1 to {first - 1} were dropped.*Go on from {first}"):
        log.read(1, 1000)
    assert offsets(log.read(first, 1)[0]) == [first]


def test_readers_in_other_threads_see_whole_records_in_order_while_it_is_written(log: Log) -> None:
    count = 50

    def follow() -> list[int]:
        found: list[int] = []
        while len(found) < count:
            values, end = log.read(len(found), 1 << 20)
            assert len(found) + len(values) <= end
            found += offsets(values)
        return found

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(follow) for _ in range(2)]
        append(log, count, 2000)
        assert [reader.result() for reader in readers] == [list(range(count))] * 2


def test_a_backup_is_the_log_as_it_was(opener: Opener, tmp_path: Path) -> None:
    log = opener.log
    several_segments(log)
    log.drop_before(log.segments()[0].end_offset)
    log.commit([Put(Table.CURSORS, b"c", encode(7))])
    first, end = log.first_offset, log.end_offset
    assert log.backup(tmp_path / "copy") == end
    append(log, 2)
    log.commit([Put(Table.CURSORS, b"c", encode(8))])
    with closing(LogWriter(tmp_path / "copy", map_bytes_max=MAP_BYTES)) as copy:
        assert (copy.first_offset, copy.end_offset, copy.load().cursors) == (first, end, {"c": 7})
        assert read_all(copy) == list(range(first, end))
        append(copy, 1)
    with LogReader(tmp_path / "copy") as reader:
        assert [record.offset for record in reader.records()] == list(range(first, end + 1))


def test_a_backup_of_an_empty_log_is_an_empty_log(log: Log, tmp_path: Path) -> None:
    assert log.backup(tmp_path / "copy") == 0
    with LogReader(tmp_path / "copy") as reader:
        assert (reader.end_offset, list(reader.records())) == (0, [])


def test_a_backup_overwrites_nothing(log: Log, tmp_path: Path) -> None:
    append(log, 1)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "precious").write_text("")
    with pytest.raises(CallError, match="not an empty directory"):
        log.backup(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["precious"]
    (tmp_path / "copy" / "precious").unlink()
    assert log.backup(tmp_path / "copy") == 1
