"""The log on disk goes on in new segments, its map grows, and it is copied, while others read it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from lightning_bus import messages as m
from lightning_bus.errors import RetiredError, StorageError
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import encode_record, offset_key
from lightning_bus.log.layout import find_segments
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Put, Table
from tests.bus_fixtures import ROOT
from tests.log_harness import (
    BODY,
    MAP_BYTES,
    SEGMENT_BYTES,
    ask,
    bodies,
    encode,
    reader_process,
    record,
    writer,
)


def fill(log: LogWriter, segments: int) -> None:
    """Write until the log has that many segments."""
    while len(log.segments()) < segments:
        log.commit([record(log.end_offset, BODY)])


def test_a_segment_is_a_directory_named_by_its_first_offset(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 2)
        second = log.segments()[1].first_offset
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == [f"{0:020}", f"{second:020}"]


def test_a_log_from_before_there_were_segments_goes_on(tmp_path: Path) -> None:
    rollout = m.Rollout(m.Submission("r-1", b"task"), Status.SUCCEEDED, 2, "w", 1.0)
    env = lmdb.open(str(tmp_path), map_size=1 << 30, max_dbs=8)
    with env.begin(write=True) as txn:
        for offset in range(3):
            txn.put(offset_key(offset), encode_record(record(offset)), db=env.open_db(b"log", txn=txn))
        txn.put(b"r-1", encode(rollout), db=env.open_db(b"rollouts", txn=txn))
        for name in (b"producers", b"cursors", b"resources"):
            env.open_db(name, txn=txn)
    env.close()
    with LogReader(tmp_path) as reader:
        assert (reader.first_offset, reader.end_offset, list(reader.rollouts())) == (0, 3, [rollout])
        assert reader.rollout("r-1") == rollout
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        assert (log.load().next_offset, log.load().rollouts) == (3, [rollout])
        fill(log, 3)
        log.commit([Put(Table.STANDINGS, b"r-1", encode(m.Standing(Status.FAILED, 3)))])
        end = log.end_offset
    with LogReader(tmp_path) as reader:
        assert [record.offset for record in reader.records()] == list(range(end))
        assert [(r.status, r.attempt, r.submission.task) for r in reader.rollouts()] == [(Status.FAILED, 3, b"task")]
    with writer(tmp_path) as log:
        second = log.segments()[1].first_offset
        assert log.drop_before(second) == second
        assert [value[:4] for value in log.read(second, 1)[0]] == [b"LBR1"]
    assert not (tmp_path / "data.mdb").exists()
    with LogReader(tmp_path) as reader:
        assert (reader.first_offset, reader.end_offset) == (second, end)


def test_a_reader_beside_the_writer_goes_on_across_segments(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 2)
        with reader_process(tmp_path) as process:
            for count in (2, 3, 5):
                fill(log, count)
                assert ask(process) == (log.end_offset, log.end_offset * len(BODY))
                log.commit([record(log.end_offset, BODY)])
                assert ask(process) == (log.end_offset, log.end_offset * len(BODY))


def test_a_reader_beside_the_writer_lives_on_when_what_it_has_open_is_dropped(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 3)
        with reader_process(tmp_path) as process:
            ask(process)
            fill(log, 6)
            first = log.drop_before(log.segments()[4].first_offset)
            assert ask(process) == (log.end_offset, (log.end_offset - first) * len(BODY))


_STEPS = """
import sys
from pathlib import Path
from lightning_bus.log.reader import LogReader
with LogReader(Path(sys.argv[1])) as reader:
    for record in reader.records(int(sys.argv[2])):
        print(record.offset, flush=True)
        sys.stdin.readline()
"""


def test_a_reader_misses_nothing_that_was_written_before_the_log_went_on_elsewhere(tmp_path: Path) -> None:
    """It saw the end of a segment; more came there, and then the next segment, before it looked again."""
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 2)
        last = log.end_offset - 1
        command = [sys.executable, "-c", _STEPS, str(tmp_path), str(last)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{last}\n"
            fill(log, 4)
            found, _ = process.communicate("\n" * log.end_offset)
        assert [int(offset) for offset in found.split()] == list(range(last + 1, log.end_offset))


def test_a_process_may_have_several_readers_beside_its_writer(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 3)
        with LogReader(tmp_path) as one, LogReader(tmp_path) as other:
            for count in (4, 6):
                records = one.records()
                next(records)
                fill(log, count)
                assert [record.offset for record in other.records()] == list(range(log.end_offset))
                assert [record.offset for record in records] == list(range(1, log.end_offset))
            log.drop_before(log.end_offset)
            assert one.first_offset == other.first_offset == log.first_offset
    with LogReader(tmp_path) as one, LogReader(tmp_path) as other:
        assert one.end_offset == other.end_offset


def test_a_reader_that_nobody_closes_leaves_nothing_open(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0)])
    reader = LogReader(tmp_path)
    assert reader.end_offset == 1
    with pytest.raises(StorageError, match="already open in this process"):
        LogWriter(tmp_path, map_bytes_max=MAP_BYTES)
    del reader
    with writer(tmp_path) as log:
        assert log.end_offset == 1


@pytest.mark.usefixtures("small_maps")
def test_the_map_may_grow_beside_a_reader_of_the_same_process(tmp_path: Path) -> None:
    with writer(tmp_path) as log, ThreadPoolExecutor(1) as threads, LogReader(tmp_path) as reader:
        count = 40

        def follow() -> int:
            seen = 0
            while seen < count:
                seen += sum(1 for _ in reader.records(seen))
            return seen

        following = threads.submit(follow)
        for offset in range(count):
            log.commit([record(offset, b"x" * (1 << 19))])
        assert following.result() == count


def test_a_reader_of_what_was_dropped_is_told_where_the_log_begins(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 3)
        first = log.drop_before(log.segments()[1].first_offset)
    with LogReader(tmp_path) as reader:
        with pytest.raises(RetiredError, match=f"Go on from {first}"):
            next(reader.records(first - 1))
        assert next(reader.records()).offset == first


def test_a_reader_takes_few_files_however_long_the_log(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        fill(log, 12)
        before = len(os.listdir("/proc/self/fd"))
        log.segments()
        for offset in range(0, log.end_offset, 3):
            log.read(offset, 1)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_opening_removes_what_a_crash_left_of_segments_being_made_or_dropped(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0)])
    for name in (".creating", ".dropped-00000000000000000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(b"half")
    assert bodies(tmp_path) == [b"body"]
    with writer(tmp_path) as log:
        assert log.end_offset == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{0:020}", "writer.lock"]


# -- growth ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bus.log.segments.MAP_BYTES_MIN", 1 << 20)


@pytest.mark.usefixtures("small_maps")
def test_a_full_map_grows_and_nobody_notices(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0)])
        with reader_process(tmp_path) as process:
            assert ask(process) == (1, 4)
            for offset in range(1, 40):
                log.commit([record(offset, b"x" * (1 << 19)), Put(Table.CURSORS, b"c", encode(offset))])
                if offset % 10 == 0:
                    assert ask(process) == (offset + 1, 4 + (offset << 19))
        assert log.load().cursors == {"c": 39}
    assert len(bodies(tmp_path)) == 40


@pytest.mark.usefixtures("small_maps")
def test_a_group_larger_than_the_map_is_taken_whole(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(offset, b"x" * (1 << 20)) for offset in range(20)])
        assert log.end_offset == 20
    assert [len(body) for body in bodies(tmp_path)] == [1 << 20] * 20


@pytest.mark.usefixtures("small_maps")
def test_tables_larger_than_a_new_segments_map_are_taken_along(tmp_path: Path) -> None:
    with writer(tmp_path, segment_bytes=SEGMENT_BYTES) as log:
        log.commit([Put(Table.CURSORS, b"%d" % n, encode(b"x" * 100_000)) for n in range(40)])
        while len(find_segments(tmp_path)) < 2:
            log.commit([record(log.end_offset, BODY)])
    with lmdb.open(str(find_segments(tmp_path)[-1].path), readonly=True, max_dbs=8) as env:
        with env.begin(env.open_db(b"cursors", create=False)) as txn:
            assert txn.stat()["entries"] == 40


@pytest.mark.usefixtures("small_maps")
def test_the_map_may_grow_while_others_read(tmp_path: Path) -> None:
    with writer(tmp_path) as log, ThreadPoolExecutor(1) as threads:
        count = 40

        def follow() -> int:
            seen = 0
            while seen < count:
                seen += len(log.read(seen, 1 << 20)[0])
            return seen

        reader = threads.submit(follow)
        for offset in range(count):
            log.commit([record(offset, b"x" * (1 << 19))])
        assert reader.result() == count


# -- backup ---------------------------------------------------------------------------------------------------------------

_BACKUP = """
import sys
from pathlib import Path
from lightning_bus.log.reader import backup
print(backup(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_a_backup_by_another_process_while_the_log_is_written_is_one_moment_of_it(tmp_path: Path) -> None:
    """Cursor and records are written together; so they must agree in the copy, and every record before them be there."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    with writer(source, segment_bytes=1 << 20) as log:
        while len(log.segments()) < 3:
            log.commit([record(log.end_offset, BODY), Put(Table.CURSORS, b"c", encode(log.end_offset + 1))])
        begun = log.end_offset
        command = [sys.executable, "-c", _BACKUP, str(source), str(copy)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            # Not for ever: the log would be full before a slow machine has made the copy.
            while process.poll() is None and log.end_offset < begun + 5000:
                log.commit([record(log.end_offset, BODY), Put(Table.CURSORS, b"c", encode(log.end_offset + 1))])
            assert process.stdout is not None
            end = int(process.stdout.read())
    with LogReader(copy) as reader:
        assert begun <= end == reader.end_offset == reader.cursors()["c"]
        assert [record.offset for record in reader.records()] == list(range(end))
    assert not list(tmp_path.glob("*.part"))
