"""A log opened read-only, beside its writer or after it: in another process, on the same machine.

What always holds: no transaction stays open between two items that a generator yields, so a reader that dawdles costs
the writer nothing; and a reader goes on while the writer goes on in new segments, lets its map grow or drops what is
old. A process may have as many readers of a log as it likes, beside its writer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import lmdb

from lightning_bus import messages as m
from lightning_bus.errors import CallError, RemoteProtocolError
from lightning_bus.log import layout
from lightning_bus.log import segments as s
from lightning_bus.log.backup import copy_log
from lightning_bus.log.base import RECORDS_PER_READ, check_offset, decode, rollout_of
from lightning_bus.log.codec import decode_record
from lightning_bus.records import Record, Table
from lightning_bus.resources import Resource

T = TypeVar("T")

# What is taken in one transaction: so little that it is still in the processor's cache when it is looked at.
READ_BYTES = 1 << 19


class LogReader:
    """A log to read. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the log in this directory. Raises CallError when there is none, StorageError when it cannot be read."""
        self.path = path
        while True:
            places = layout.find_segments(path)
            if not places:
                raise CallError(f"{path} holds no log (no data.mdb in it). Give a run's directory, such as runs/calc.")
            try:
                self._segments = s.Segments(places, s.open_live(places[-1]))
                return
            except lmdb.Error as exc:
                if places[-1].file.exists():
                    raise layout.storage_error(path, "read", exc) from exc  # else it was dropped since we looked

    @property
    def first_offset(self) -> int:
        """The oldest record that is kept."""
        self._look_again()
        return self._segments.first_offset

    @property
    def end_offset(self) -> int:
        """The offset after the last record."""
        self._look_again()
        newest = self._segments.newest
        with newest.begin() as txn:
            return newest.end_offset(txn)

    def records(self, offset: int | None = None) -> Iterator[Record]:
        """Yield the records from `offset`, or the oldest, to the end of the log.

        Raises RemoteProtocolError on a damaged one, RetiredError when `offset` was dropped, also while reading.
        """
        if offset is None:
            offset = self.first_offset
        while True:
            try:
                found, offset = self._batch(offset, decode_record)
            except RemoteProtocolError:  # the ones before it are yielded first
                for value in self.values(offset):
                    yield decode_record(value)
                return
            if not found:
                return
            yield from found

    def values(self, offset: int | None = None) -> Iterator[bytes]:
        """Yield the encoded records from `offset`, or the oldest, on. Raises RetiredError when `offset` was dropped."""
        if offset is None:
            offset = self.first_offset
        while True:
            found, offset = self._batch(offset, bytes)
            if not found:
                return
            yield from found

    def rollouts(self) -> Iterator[m.Rollout]:
        """Yield where each rollout stands when it is read, by id."""
        return self._scan(Table.ROLLOUTS, _rollout)

    def rollout(self, rollout_id: str) -> m.Rollout | None:
        """Return where a rollout stands; None when the log does not know it."""
        self._look_again()
        newest = self._segments.newest
        with newest.begin() as txn:
            key = rollout_id.encode()
            value = txn.get(key, db=newest.tables[Table.ROLLOUTS])
            return None if value is None else _rollout(newest, txn, key, value)

    def resources(self) -> Iterator[Resource]:
        """Yield every published resource, by name and version."""
        return self._scan(Table.RESOURCES, lambda segment, txn, key, value: decode(value, Resource))

    def cursors(self) -> dict[str, int]:
        """Return where each named reader is."""
        found = self._scan(Table.CURSORS, lambda segment, txn, key, value: (key.decode(), decode(value, int)))
        return dict(found)

    def backup(self, target: Path) -> int:
        """Copy the log as it is at one moment into a new directory. Returns the copy's end_offset."""

        def places() -> tuple[layout.Place, ...]:
            self._look_again()
            return self._segments.places

        return copy_log(self._segments, places, target)

    def close(self) -> None:
        self._segments.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batch(self, offset: int, convert: Callable[[Any], T]) -> tuple[list[T], int]:
        """Return the next records in order, whichever segment they are in, and where to go on; none at the log's end."""
        while True:
            places = self._segments.places
            check_offset(offset, places[0].first_offset)
            place = self._segments.place_of(offset)
            try:
                segment = self._segments.at(place)
            except lmdb.Error as exc:
                if place.file.exists() or not self._look_again():
                    raise layout.storage_error(self.path, "read", exc) from exc
                continue  # it was dropped since we looked
            with segment.begin(buffers=True) as txn:
                found, following = segment.read(txn, offset, READ_BYTES, convert)
            if found:
                return found, following
            if place is not places[-1]:
                offset = places[places.index(place) + 1].first_offset
            elif not self._look_again():
                # The writer may have written here and gone on elsewhere before we looked, so after a change we read
                # this segment once more before we believe in its end.
                return found, offset

    def _scan(self, table: Table, make: Callable[[s.Segment, Any, bytes, bytes], T]) -> Iterator[T]:
        """Yield what `make` makes of each key and value of a table, a piece a transaction."""
        key = b""
        while True:
            self._look_again()
            newest = self._segments.newest
            found: list[T] = []
            if table not in newest.tables:
                return
            with newest.begin() as txn:
                cursor = txn.cursor(newest.tables[table])
                if cursor.set_range(key + b"\0") if key else cursor.first():
                    for (key, value), _ in zip(cursor, range(RECORDS_PER_READ), strict=False):
                        found.append(make(newest, txn, key, value))
            if not found:
                return
            yield from found

    def _look_again(self) -> bool:
        """Look what the log consists of now. True when that has changed."""
        before = self._segments.places
        while True:
            places = layout.find_segments(self.path)
            if not places or tuple(places) == before:
                return False
            newest = self._segments.newest
            try:
                self._segments.go_on(places, newest if places[-1] == newest.place else s.open_live(places[-1]))
            except lmdb.Error as exc:
                if places[-1].file.exists():
                    raise layout.storage_error(self.path, "read", exc) from exc
            else:
                return True


def backup(source: Path, target: Path) -> int:
    """Copy the log in directory `source` into a new directory `target`, also while a broker in another process writes it.

    Returns the copy's end_offset. Raises CallError when there is no log, or the target exists and is not empty.
    """
    with LogReader(source) as reader:
        return reader.backup(target)


def _rollout(segment: s.Segment, txn: Any, key: bytes, value: bytes) -> m.Rollout:
    standings = segment.tables.get(Table.STANDINGS)
    return rollout_of(value, None if standings is None else txn.get(key, db=standings))
