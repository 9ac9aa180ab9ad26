"""What the broker needs of a log, whoever keeps it: an LMDB directory (`store`), memory (`memory`), or, one day, several machines.

Records have contiguous offsets and are only ever appended; tables hold one value a key. A group of writes lands whole
or not at all, and when `commit` returns it is as durable as this log makes anything. The oldest records may be dropped,
a segment at a time; offsets are never given twice, so a reader that comes too late is told so and never misled.

`tests/contracts/test_log.py` is this page as claims, and every implementation passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker.state import Snapshot
from lightning_bus.errors import RetiredError
from lightning_bus.log.retention import SegmentInfo
from lightning_bus.records import ProducerMark, Table, Write
from lightning_bus.resources import Resource

T = TypeVar("T")

RECORDS_PER_READ = 1024  # one read takes no more than this, however small they are
Pairs = Iterable[tuple[bytes, bytes]]


class Log(Protocol):
    """A log, open for writing. `commit` is called by one thread, always the same; the rest may come from any."""

    @property
    def first_offset(self) -> int:
        """The oldest record that is kept."""
        ...

    @property
    def end_offset(self) -> int:
        """The offset after the last durable record."""
        ...

    def load(self) -> Snapshot:
        """Return what a broker needs to go on where the log ends. Raises StorageError when that is damaged."""
        ...

    def commit(self, writes: Sequence[Write]) -> None:
        """Make all writes durable, in one transaction.

        Of several writes to one key the last counts. Raises StorageError, and then the process must stop: memory is
        ahead of the log from that moment on. AssertionError: a record's offset is not the one that is due.
        """
        ...

    def read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        """Return encoded records from `offset` on, and the offset after the log's last.

        At least one when there is one, then about bytes_max of them, in order and without gaps; a read may stop at the
        end of a segment. None at or beyond the end. Raises RetiredError below first_offset.
        """
        ...

    def segments(self) -> list[SegmentInfo]:
        """Return the pieces in which the log can be dropped, oldest first; the last is being written."""
        ...

    def drop_before(self, offset: int) -> int:
        """Drop the segments that end at or before `offset`, but never the one being written. Returns first_offset."""
        ...

    def backup(self, target: Path) -> int:
        """Copy the log as it is at one moment into a new directory, durably, while it is written to.

        Returns the copy's end_offset. Raises CallError when the target exists and is not empty; the copy appears there
        whole or not at all, and `store.LogWriter` opens it.
        """
        ...

    def close(self) -> None: ...


def check_offset(offset: int, first_offset: int) -> None:
    """Raise RetiredError when a reader asks for what was dropped."""
    if offset < first_offset:
        raise RetiredError(
            f"records {offset} to {first_offset - 1} were dropped by retention; the log begins at {first_offset}. "
            f"Go on from {first_offset}. To keep what a reader has not seen, give it a cursor before it starts."
        )


def snapshot_of(first_offset: int, end_offset: int, pairs: Callable[[Table], Pairs]) -> Snapshot:
    """Return what these tables say. Raises msgspec.DecodeError or UnicodeDecodeError when they are damaged."""
    return Snapshot(
        first_offset=first_offset,
        next_offset=end_offset,
        rollouts=[decode(value, m.Rollout) for _, value in pairs(Table.ROLLOUTS)],
        standings={key.decode(): decode(value, m.Standing) for key, value in pairs(Table.STANDINGS)},
        producers={key.decode(): decode(value, ProducerMark) for key, value in pairs(Table.PRODUCERS)},
        cursors={key.decode(): decode(value, int) for key, value in pairs(Table.CURSORS)},
        resources=[decode(value, Resource) for _, value in pairs(Table.RESOURCES)],
    )


def rollout_of(value: bytes, standing: bytes | None) -> m.Rollout:
    """Return a rollout as it stands, from its values in Table.ROLLOUTS and Table.STANDINGS."""
    rollout = decode(value, m.Rollout)
    if standing is not None:
        found = decode(standing, m.Standing)
        for name in found.__struct_fields__:
            setattr(rollout, name, getattr(found, name))
    return rollout


def decode(value: bytes, kind: type[T]) -> T:
    return msgspec.msgpack.decode(value, type=kind)
