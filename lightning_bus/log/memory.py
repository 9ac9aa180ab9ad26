"""A log in memory, for tests and simulations: it keeps every promise of `base.Log` but durability.

What was committed outlives `close` in a MemoryDisk: hand the same one to the next MemoryLog, as a broker that starts
again opens the same directory. Values go through the real encoder, and what is read comes from the encoded bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from lightning_bus.broker.state import Snapshot
from lightning_bus.log.backup import MAP_BYTES_MAX, appearing
from lightning_bus.log.base import RECORDS_PER_READ, check_offset, snapshot_of
from lightning_bus.log.codec import decode_record, encode_record
from lightning_bus.log.retention import SegmentInfo
from lightning_bus.log.segments import make_segment
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Put, Record, Table, Write

KEY_BYTES_MAX = 511  # LMDB's
SEGMENT_BYTES = 64 << 20


@dataclass(slots=True)
class MemorySegment:
    first_offset: int
    values: list[bytes] = field(default_factory=list[bytes])
    size: int = 0

    @property
    def end_offset(self) -> int:
        return self.first_offset + len(self.values)


@dataclass(slots=True)
class MemoryDisk:
    """What stays when a log is closed."""

    segments: list[MemorySegment] = field(default_factory=lambda: [MemorySegment(0)])
    tables: dict[Table, dict[bytes, bytes]] = field(default_factory=lambda: {table: {} for table in Table})


class MemoryLog:
    """A log in memory; what its methods promise is written in `base.Log`."""

    def __init__(self, disk: MemoryDisk | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._disk = disk if disk is not None else MemoryDisk()
        self._segment_bytes = max(1, segment_bytes)
        self._lock = threading.Lock()

    @property
    def first_offset(self) -> int:
        return self._disk.segments[0].first_offset

    @property
    def end_offset(self) -> int:
        return self._disk.segments[-1].end_offset

    def load(self) -> Snapshot:
        with self._lock:
            return snapshot_of(
                self.first_offset, self.end_offset, lambda table: sorted(self._disk.tables[table].items())
            )

    def commit(self, writes: Sequence[Write]) -> None:
        records = [write for write in writes if isinstance(write, Record)]
        for due, record in enumerate(records, start=self.end_offset):
            assert record.offset == due, f"record {record.offset} comes where {due} is due"
        values = [encode_record(record) for record in records]
        state = [write for write in writes if not isinstance(write, Record)]
        assert all(0 < len(write.key) <= KEY_BYTES_MAX for write in state), "LMDB's limit for keys"
        with self._lock:
            if self._disk.segments[-1].size >= self._segment_bytes:
                self._disk.segments.append(MemorySegment(self.end_offset))
            newest = self._disk.segments[-1]
            newest.values += values
            newest.size += sum(map(len, values))
            for write in state:
                if isinstance(write, Put):
                    self._disk.tables[write.table][write.key] = write.value
                else:
                    self._disk.tables[write.table].pop(write.key, None)

    def read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        with self._lock:
            check_offset(offset, self.first_offset)
            segment = next(s for s in reversed(self._disk.segments) if s.first_offset <= offset)
            values: list[bytes] = []
            size = 0
            at = offset - segment.first_offset
            for value in segment.values[at : at + RECORDS_PER_READ]:
                size += len(value)
                if values and size > bytes_max:
                    break
                values.append(value)
            return values, self.end_offset

    def segments(self) -> list[SegmentInfo]:
        with self._lock:
            return [
                SegmentInfo(
                    s.first_offset, s.end_offset, s.size, decode_record(s.values[-1]).wall_ns if s.values else 0
                )
                for s in self._disk.segments
            ]

    def drop_before(self, offset: int) -> int:
        with self._lock:
            kept = [s for s in self._disk.segments[:-1] if s.end_offset > offset]
            self._disk.segments = [*kept, self._disk.segments[-1]]
            return self.first_offset

    def backup(self, target: Path) -> int:
        with appearing(target) as draft:
            make_segment(draft, self.first_offset, MAP_BYTES_MAX)
            with self._lock, closing(LogWriter(draft, map_bytes_max=MAP_BYTES_MAX)) as copy:
                for segment in self._disk.segments:
                    copy.commit([decode_record(value) for value in segment.values])
                tables = self._disk.tables.items()
                copy.commit([Put(table, key, value) for table, pairs in tables for key, value in pairs.items()])
                return copy.end_offset

    def close(self) -> None:
        pass
