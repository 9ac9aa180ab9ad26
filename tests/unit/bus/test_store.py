"""The LMDB log, on a real disk. Readers beside the writer are processes of their own, but where a test says otherwise."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from lightning_bus.errors import CallError, Conflict, RemoteProtocolError, StorageError
from lightning_bus.log.base import RECORDS_PER_READ
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Put, Table
from tests.log_harness import (
    BODY,
    MAP_BYTES,
    SEGMENT_BYTES,
    ask,
    bodies,
    data_file,
    encode,
    reader_process,
    record,
    writer,
)


def test_records_are_read_in_the_order_of_their_offsets(tmp_path: Path) -> None:
    count = 2 * RECORDS_PER_READ + 3
    with writer(tmp_path) as log:
        log.commit([record(offset, b"%d" % offset) for offset in range(count)])
    with LogReader(tmp_path) as reader:
        assert [int(record.body) for record in reader.records()] == list(range(count))
        assert [record.offset for record in reader.records(count - 2)] == [count - 2, count - 1]
        assert list(reader.records(count)) == []


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


def test_a_disk_too_full_for_a_new_segment_loses_nothing(small_disk: Path) -> None:
    path = small_disk / "log"
    with writer(path, segment_bytes=SEGMENT_BYTES) as log:
        log.commit([Put(Table.CURSORS, b"c", encode(7)), Put(Table.CURSORS, b"large", encode(b"x" * (2 << 20)))])
        for offset in range(5):  # as many as a segment takes
            log.commit([record(offset, BODY)])
        with pytest.raises(StorageError, match=r"cannot write to the log.*MB free.*free space on the disk"):
            log.commit([record(5), Put(Table.CURSORS, b"c", encode(8))])
    assert bodies(path) == [BODY] * 5
    with writer(path) as log:
        assert (log.end_offset, len(log.segments())) == (5, 1)
        log.commit([record(5), Put(Table.CURSORS, b"large", encode(0))])
        assert log.load().cursors == {"c": 7, "large": 0}


def test_a_place_that_holds_no_log_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="holds no log"):
        LogReader(tmp_path)


def test_a_file_that_is_no_log_is_said_so_and_nothing_stays_locked(tmp_path: Path) -> None:
    with writer(tmp_path):
        pass
    data_file(tmp_path).write_bytes(b"not a database, but long enough to look at" * 1000)
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
        log.commit([record(0), record(1, b"precious" * 10), record(2)])
    data = bytearray(data_file(tmp_path).read_bytes())
    at = data.index(b"precious")
    data[at] ^= 1
    data_file(tmp_path).write_bytes(data)
    found: list[int] = []
    with LogReader(tmp_path) as reader, pytest.raises(RemoteProtocolError, match="record 1 is damaged"):
        found.extend(record.offset for record in reader.records())
    assert found == [0], "what comes before it is read"


def test_the_keys_are_big_endian_offsets(tmp_path: Path) -> None:
    """What any LMDB tool shows; the layout is a promise."""
    with writer(tmp_path) as log:
        log.commit([record(0), record(1)])
    with lmdb.open(str(data_file(tmp_path).parent), readonly=True, max_dbs=8) as env:
        db = env.open_db(b"log", create=False)
        with env.begin(db) as txn:
            assert list(txn.cursor().iternext(values=False)) == [b"\0" * 8, b"\0" * 7 + b"\1"]
