"""The log on a disk: LMDB segments, one writing thread, any number of readers in any process.

Durability is LMDB's own: copy-on-write pages, then fdatasync, then a synchronous write of the meta page. When `commit`
returns, its writes are on disk; when it raises, none of them is, and the process must stop, because memory is ahead of
the disk from then on. The log goes on in a new segment between two transactions; `layout` shows how.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from lightning_bus.broker.state import Snapshot
from lightning_bus.errors import Conflict, StorageError
from lightning_bus.log import layout
from lightning_bus.log import segments as s
from lightning_bus.log.backup import copy_log
from lightning_bus.log.base import check_offset, snapshot_of
from lightning_bus.log.codec import encode_record, offset_key
from lightning_bus.log.retention import SegmentInfo
from lightning_bus.records import Put, Record, Table, Write

SEGMENT_BYTES = 4 << 30


class LogWriter:
    """The only writer of a log; what its methods promise is written in `base.Log`."""

    def __init__(self, path: Path, *, map_bytes_max: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the log in this directory, or make one there.

        map_bytes_max   how large one segment's map may grow; the rest of a full one can be written after raising it
        segment_bytes   what a segment's records weigh when the log goes on in the next

        Raises Conflict when another process writes to it, StorageError when it cannot be opened.
        """
        self.path = path
        self._map_bytes_max = map_bytes_max
        self._segment_bytes = max(1, segment_bytes)  # a segment has at least one record, or two would have one name
        self._newest_wall_ns: dict[int, int] = {}  # of sealed segments, by first offset: those do not change
        self._lock = _lock_writer(path)
        try:
            layout.remove_litter(path)
            places = layout.find_segments(path) or [_first_segment(path, map_bytes_max)]
            newest = s.open_writable(places[-1], min(s.MAP_BYTES_MIN, map_bytes_max))
            newest.env.reader_check()  # readers that died hold their slot until someone looks
            self._segments = s.Segments(places, newest)
            with newest.begin() as txn:
                self._end_offset = newest.end_offset(txn)
                self._records_bytes = _weight(txn, newest)
        except (lmdb.Error, OSError) as exc:
            self._lock.close()
            raise layout.storage_error(path, "open", exc) from exc

    @property
    def first_offset(self) -> int:
        return self._segments.first_offset

    @property
    def end_offset(self) -> int:
        return self._end_offset

    def commit(self, writes: Sequence[Write]) -> None:
        """Make all writes durable in one transaction. Raises StorageError, having written nothing."""
        records: list[Record] = []
        state: dict[tuple[Table, bytes], bytes | None] = {}  # each key once: a group moves a rollout several times
        for write in writes:
            if isinstance(write, Record):
                due = self._end_offset + len(records)
                assert write.offset == due, f"record {write.offset} comes where {due} is due"
                records.append(write)
            else:
                state[write.table, write.key] = write.value if isinstance(write, Put) else None
        try:
            if self._records_bytes >= self._segment_bytes:
                self._go_on_in_a_new_segment()
            newest = self._segments.newest
            write_all = partial(self._write, newest, records, state)
            s.write_growing(newest.env, self._map_bytes_max, write_all, newest.lock)
        except (lmdb.Error, OSError) as exc:
            raise layout.storage_error(self.path, "write to", exc) from exc
        self._end_offset += len(records)

    def load(self) -> Snapshot:
        """Return what a broker needs to go on where the log ends. Raises StorageError when a table is damaged."""
        newest = self._segments.newest
        try:
            with self._segments.lock, newest.begin() as txn:
                return snapshot_of(self.first_offset, self._end_offset, partial(newest.pairs, txn))
        except (lmdb.Error, msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise StorageError(
                f"the log {self.path} is damaged: {exc}. Its records may still be whole: lightning-bus verify says which. "
                "Restore it from a backup, or choose another run name."
            ) from exc

    def read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        """Return encoded records from `offset` on, about bytes_max of them, and the offset after the log's last."""
        check_offset(offset, self.first_offset)
        end_offset = self._end_offset  # first, so that no record is returned that lies beyond it
        if offset >= end_offset:
            return [], end_offset
        with self._segments.lock:
            check_offset(offset, self.first_offset)
            segment = self._segments.at(self._segments.place_of(offset))
            with segment.begin() as txn:
                values, _ = segment.read(txn, offset, bytes_max, bytes)
        return values[: end_offset - offset], end_offset

    def segments(self) -> list[SegmentInfo]:
        """Return the log's segments, oldest first."""
        found: list[SegmentInfo] = []
        with self._segments.lock:
            places = self._segments.places
            ends = [*(place.first_offset for place in places[1:]), self._end_offset]
            for place, end in zip(places, ends, strict=True):
                newest_wall_ns = self._newest_wall_ns.get(place.first_offset)
                if newest_wall_ns is None:
                    newest_wall_ns = self._segments.at(place).newest_wall_ns()
                    if place is not places[-1]:
                        self._newest_wall_ns[place.first_offset] = newest_wall_ns
                found.append(SegmentInfo(place.first_offset, end, place.file.stat().st_size, newest_wall_ns))
        return found

    def drop_before(self, offset: int) -> int:
        """Drop the sealed segments that end at or before `offset`, and return where the log begins then."""
        with self._segments.lock:
            places = self._segments.places
            ends = [place.first_offset for place in places[1:]]
            dropped = [place for place, end in zip(places, ends, strict=False) if end <= offset]
            self._segments.close_sealed()
            self._segments.places = places[len(dropped) :]
        try:
            layout.drop_segments(self.path, dropped)
        except OSError as exc:
            raise layout.storage_error(self.path, "drop segments of", exc) from exc
        for place in dropped:
            self._newest_wall_ns.pop(place.first_offset, None)
        return self.first_offset

    def backup(self, target: Path) -> int:
        """Copy the log as it is at one moment into a new directory. Returns the copy's end_offset."""
        return copy_log(self._segments, lambda: self._segments.places, target)

    def close(self) -> None:
        self._segments.close()
        self._lock.close()

    def _write(
        self, newest: s.Segment, records: list[Record], state: dict[tuple[Table, bytes], bytes | None], txn: Any
    ) -> None:
        # One at a time: encoding a whole group first touches fresh memory for all of it, which costs more than it saves.
        for record in records:
            fresh = txn.put(offset_key(record.offset), encode_record(record), db=newest.log, append=True)
            assert fresh, f"offset {record.offset} is taken"
        for (table, key), value in state.items():
            if value is None:
                txn.delete(key, db=newest.tables[table])
            else:
                txn.put(key, value, db=newest.tables[table])
        self._records_bytes = _weight(txn, newest)

    def _go_on_in_a_new_segment(self) -> None:
        """Between two transactions. Whenever the process dies in here, the log that opens again ends where it ended."""
        place = s.make_segment(self.path, self._end_offset, self._map_bytes_max, tables_of=self._segments.newest)
        newest = s.open_writable(place, min(s.MAP_BYTES_MIN, self._map_bytes_max))
        with self._segments.lock:
            self._segments.go_on([*self._segments.places, place], newest)


def _first_segment(path: Path, map_bytes_max: int) -> layout.Place:
    place = s.make_segment(path, 0, map_bytes_max)
    for directory in (path.parent, path.parent.parent):  # the log's own directory may be new as well
        layout.sync(directory)
    return place


def _weight(txn: Any, segment: s.Segment) -> int:
    """Return what the records of a segment weigh, without its tables: a large state must not fill one by itself."""
    stat: dict[str, int] = txn.stat(segment.log)
    return (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"]


def _lock_writer(path: Path) -> Any:
    """Keep a second broker away from this log. The kernel lets go of the lock when this process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "writer.lock", "w")  # noqa: SIM115 - held as long as the writer lives
    except OSError as exc:
        raise layout.storage_error(path, "open", exc) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise Conflict(f"{path} is being written by another broker. Stop it, or choose another run name.") from exc
    return lock
