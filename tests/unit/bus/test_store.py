"""The LMDB log, on a real disk. LMDB opens an environment once in a process, so readers beside the writer are processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import lmdb
import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus.errors import CallError, Conflict, RemoteProtocolError, StorageError
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_record
from lightning_bus.log.store import RECORDS_PER_READ, LogReader, LogWriter
from lightning_bus.records import Kind, ProducerMark, Put, Record, Table, Write
from lightning_bus.resources import Resource
from tests.bus_fixtures import ROOT

MAP_BYTES = 1 << 30
encode = msgspec.msgpack.encode


def record(offset: int, body: bytes = b"body") -> Record:
    return Record(offset, Kind.SPANS, "p", 1, offset + 1, 0, "", 0, 1, 0, body)


@contextmanager
def writer(path: Path, map_bytes_max: int = MAP_BYTES) -> Iterator[LogWriter]:
    with closing(LogWriter(path, map_bytes_max=map_bytes_max)) as log:
        yield log


def bodies(path: Path) -> list[bytes]:
    with LogReader(path) as reader:
        return [record.body for record in reader.records()]


_READER = """
import sys
from pathlib import Path
from lightning_bus.log.store import LogReader
with LogReader(Path(sys.argv[1])) as reader:
    for _ in sys.stdin:
        print(reader.end_offset, sum(len(record.body) for record in reader.records()), flush=True)
"""


@contextmanager
def reader_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _READER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process


def ask(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    offset, size = process.stdout.readline().split()
    return int(offset), int(size)


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    rollout = m.Rollout(m.Submission("r-1", b"task"), Status.LEASED, 2, "w", None, "boom", 0)
    mark = ProducerMark(3, 4, [1], b"nonce")
    resource = Resource("weights", 1, b"w")
    writes: list[Write] = [
        record(0), record(1),
        Put(Table.ROLLOUTS, b"r-1", encode(rollout)),
        Put(Table.PRODUCERS, b"p", encode(mark)),
        Put(Table.CURSORS, b"c", encode(1)),
        Put(Table.RESOURCES, b"weights\0\0\0\0\0\0\0\0\1", encode(resource)),
    ]  # fmt: skip
    with writer(tmp_path / "log") as log:
        assert log.load().next_offset == 0
        log.commit(writes)
    with writer(tmp_path / "log") as log:
        snapshot = log.load()
    assert snapshot.next_offset == 2
    assert snapshot.rollouts == [rollout]
    assert (snapshot.producers, snapshot.cursors, snapshot.resources) == ({"p": mark}, {"c": 1}, [resource])
    with LogReader(tmp_path / "log") as reader:
        assert list(reader.rollouts()) == [rollout]
        assert list(reader.resources()) == [resource]
        assert reader.end_offset == 2


def test_records_are_read_in_the_order_of_their_offsets(tmp_path: Path) -> None:
    count = 2 * RECORDS_PER_READ + 3
    with writer(tmp_path) as log:
        log.commit([record(offset, b"%d" % offset) for offset in range(count)])
    with LogReader(tmp_path) as reader:
        assert [int(record.body) for record in reader.records()] == list(range(count))
        assert [record.offset for record in reader.records(count - 2)] == [count - 2, count - 1]
        assert list(reader.records(count)) == []


def test_a_taken_offset_is_not_written_over(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0, b"first"), record(1)])
        with pytest.raises(AssertionError, match="offset 0 is taken"):
            log.commit([record(2), record(0, b"second")])
    assert bodies(tmp_path) == [b"first", b"body"]  # and what came with it was not written either


def test_a_read_takes_at_least_one_record_and_stops_at_its_size(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(offset, b"x" * 1000) for offset in range(10)])
        values, end = log.read(0, 1)
        assert ([decode_record(value).offset for value in values], end) == ([0], 10)
        assert [decode_record(value).offset for value in log.read(3, 3500)[0]] == [3, 4, 5]
        assert log.read(10, 1000) == ([], 10)
        assert log.read(99, 1000) == ([], 10)


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with writer(tmp_path):
        with pytest.raises(Conflict, match="written by another broker. Stop it"):
            LogWriter(tmp_path, map_bytes_max=MAP_BYTES)
    with writer(tmp_path):
        pass


def test_a_reader_beside_the_writer_sees_what_is_committed(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0)])
        with reader_process(tmp_path) as process:
            assert ask(process) == (1, 4)
            log.commit([record(1), record(2)])
            assert ask(process) == (3, 12)


def test_a_reader_lives_on_when_the_log_outgrows_what_it_opened(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0)])
        with reader_process(tmp_path) as process:
            ask(process)
            log.commit([record(offset, b"x" * (1 << 20)) for offset in range(1, 25)])
            assert ask(process) == (25, 4 + (24 << 20))


def test_a_full_map_writes_nothing_of_the_group_and_keeps_the_rest(tmp_path: Path) -> None:
    with writer(tmp_path, map_bytes_max=1 << 20) as log:
        log.commit([record(0)])
        with pytest.raises(StorageError, match="MDB_MAP_FULL.*Everything acknowledged so far is safe"):
            log.commit([record(1), Put(Table.CURSORS, b"c", encode(1)), record(2, b"x" * (2 << 20))])
        assert log.load().next_offset == 1
        assert log.load().cursors == {}
    assert bodies(tmp_path) == [b"body"]
    with writer(tmp_path) as log:  # with room, it goes on where it was
        log.commit([record(1)])
    assert bodies(tmp_path) == [b"body"] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_writes_nothing_of_the_group_and_keeps_the_rest(small_disk: Path) -> None:
    path = small_disk / "log"
    with writer(path) as log:
        log.commit([record(0)])
        with pytest.raises(StorageError, match=r"cannot write to the log.*MB free.*free space on the disk"):
            log.commit([record(1, b"x" * (8 << 20))])
    assert bodies(path) == [b"body"]
    with writer(path) as log:
        assert log.load().next_offset == 1
        log.commit([record(1)])
    assert bodies(path) == [b"body"] * 2


def test_a_place_that_holds_no_log_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="holds no log"):
        LogReader(tmp_path)


def test_a_file_that_is_no_log_is_said_so_and_nothing_stays_locked(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database, but long enough to look at" * 1000)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot open the log"):
            LogWriter(tmp_path, map_bytes_max=MAP_BYTES)
    with pytest.raises(StorageError, match="cannot read the log"):
        LogReader(tmp_path)


def test_a_path_that_cannot_be_a_directory_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot open the log"):
        LogWriter(tmp_path / "file", map_bytes_max=MAP_BYTES)


def test_a_flipped_bit_on_disk_is_noticed_when_read(tmp_path: Path) -> None:
    with writer(tmp_path) as log:
        log.commit([record(0, b"precious" * 10), record(1)])
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    at = data.index(b"precious")
    data[at] ^= 1
    (tmp_path / "data.mdb").write_bytes(data)
    with LogReader(tmp_path) as reader, pytest.raises(RemoteProtocolError, match="record 0 is damaged"):
        list(reader.records())


def test_the_keys_are_big_endian_offsets(tmp_path: Path) -> None:
    """What any LMDB tool shows; the layout is a promise."""
    with writer(tmp_path) as log:
        log.commit([record(0), record(1)])
    with lmdb.open(str(tmp_path), readonly=True, max_dbs=8) as env:
        db = env.open_db(b"log", create=False)
        with env.begin(db) as txn:
            assert list(txn.cursor().iternext(values=False)) == [b"\0" * 8, b"\0" * 7 + b"\1"]
