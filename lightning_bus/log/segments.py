"""LMDB environments as segments: opening, making, growing and copying them. `layout` says where they are.

What always holds: a new segment appears under its name whole and synced, with the state that the one before it ended
with. sync and metasync stay on (without metasync the last acknowledged commit can be lost in a power cut), writemap stays
off (with it a full disk is a SIGBUS).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from lightning_bus.errors import RemoteProtocolError
from lightning_bus.log import layout
from lightning_bus.log.base import RECORDS_PER_READ
from lightning_bus.log.codec import decode_record, offset_key
from lightning_bus.log.layout import Place
from lightning_bus.records import Table

T = TypeVar("T")

LOG = b"log"
TABLES_MAX = 16  # room for tables that later versions add
READERS_MAX = 512
MAP_BYTES_MIN = 1 << 30  # a new segment's map; it doubles when it is full


class Environment:
    """An open LMDB environment, shared by all of this process that have it open: LMDB opens one only once a process."""

    def __init__(self, env: Any, *, create: bool) -> None:
        self.env = env
        self.lock = threading.Lock()  # held by read transactions, and while the map changes: they must not meet
        self.users = 0
        self.log: Any = env.open_db(LOG, create=create)
        self.tables: dict[Table, Any] = {}
        for table in Table:
            try:
                self.tables[table] = env.open_db(table.value.encode(), create=create)
            except lmdb.NotFoundError:
                continue  # a log that was last written before there was this table


class Segment:
    """A segment, open. Transactions are as short as a read: an old one would pin the pages that others free."""

    def __init__(self, place: Place, key: tuple[int, ...], environment: Environment) -> None:
        self.place = place
        self.env = environment.env
        self.lock = environment.lock
        self.log = environment.log
        self.tables = environment.tables
        self._release = weakref.finalize(self, _release, key)  # also when nobody closes it
        self._release.atexit = False

    @contextmanager
    def begin(self, *, buffers: bool = False) -> Generator[Any]:
        """Give a read transaction. Values are views that end with it when buffers=True."""
        with self.lock:
            try:
                txn = self.env.begin(buffers=buffers)
            except lmdb.MapResizedError:  # its writer, in another process, made the map larger
                self.env.set_mapsize(0)
                txn = self.env.begin(buffers=buffers)
            with txn:
                yield txn

    def end_offset(self, txn: Any) -> int:
        """Return the offset after the last record."""
        cursor = txn.cursor(self.log)
        return _offset(cursor.key()) + 1 if cursor.last() else self.place.first_offset

    def pairs(self, txn: Any, table: Table) -> Iterator[tuple[bytes, bytes]]:
        """Yield a table's keys and values, in the order of the keys."""
        if table in self.tables:
            yield from txn.cursor(self.tables[table])

    def read(self, txn: Any, offset: int, bytes_max: int, convert: Callable[[Any], T]) -> tuple[list[T], int]:
        """Return records from `offset` on, at least one and about bytes_max of them, and the offset to go on from."""
        found: list[T] = []
        size = 0
        cursor = txn.cursor(self.log)
        if not cursor.set_range(offset_key(offset)):
            return found, offset
        for value in cursor.iternext(keys=False):
            size += len(value)
            if found and (size > bytes_max or len(found) >= RECORDS_PER_READ):
                return found, _offset(cursor.key())
            found.append(convert(value))
        cursor.last()
        return found, _offset(cursor.key()) + 1

    def newest_wall_ns(self) -> int:
        """Return when the last record was made; when the file was last written where that record is damaged."""
        with self.begin(buffers=True) as txn:
            cursor = txn.cursor(self.log)
            if not cursor.last():
                return 0
            try:
                return decode_record(cursor.value()).wall_ns
            except RemoteProtocolError:
                return self.place.file.stat().st_mtime_ns

    def close(self) -> None:
        self._release()


class Segments:
    """The open segments of a log: the newest, and at most one that is sealed, so that a long log takes few files.

    Hold `lock` while using one when several threads have this object: another may go on to the next segment.
    """

    def __init__(self, places: list[Place], newest: Segment) -> None:
        self.lock = threading.Lock()
        self.places = tuple(places)
        self.newest = newest
        self._sealed: Segment | None = None

    @property
    def first_offset(self) -> int:
        return self.places[0].first_offset

    def place_of(self, offset: int) -> Place:
        """Return the segment that holds this record, or would."""
        return next((p for p in reversed(self.places) if p.first_offset <= offset), self.places[0])

    def at(self, place: Place) -> Segment:
        """Return that segment, open until another is asked for."""
        if place == self.newest.place:
            return self.newest
        if self._sealed is None or self._sealed.place != place:
            self.close_sealed()
            self._sealed = open_sealed(place)
        return self._sealed

    def go_on(self, places: list[Place], newest: Segment) -> None:
        """Take what the log consists of now; the segment that was the newest is sealed."""
        if newest is not self.newest:
            self.newest.close()
        self.places, self.newest = tuple(places), newest

    def close_sealed(self) -> None:
        if self._sealed is not None:
            self._sealed.close()
            self._sealed = None

    def close(self) -> None:
        with self.lock:
            self.close_sealed()
            self.newest.close()


# -- opening ------------------------------------------------------------------------------------------------------------


def open_writable(place: Place, map_bytes: int) -> Segment:
    """Open the newest segment to write to it. A table that the log does not have yet is made."""
    return _share(place, create=True, map_size=map_bytes)


def open_live(place: Place) -> Segment:
    """Open the newest segment beside its writer, or after it."""
    # map_size 0 is the writer's own; lmdb's default of 10 MiB would end the reader when the log outgrows it.
    return _share(place, create=False, map_size=0, readonly=True)


def open_sealed(place: Place) -> Segment:
    """Open a segment that nobody writes to: no lock, so nothing to clean up where a reader died."""
    return _share(place, create=False, map_size=0, readonly=True, lock=False)


_environments: dict[tuple[int, ...], Environment] = {}  # by process, device and inode
_environments_lock = threading.RLock()  # again by the same thread, where a collected segment is released


def _share(place: Place, *, create: bool, **options: Any) -> Segment:
    """Return a segment with the environment that this process has open there, or a new one."""
    try:
        about = place.file.stat()
    except OSError as exc:
        raise lmdb.Error(f"{place.file}: {exc.strerror}") from exc
    key = os.getpid(), about.st_dev, about.st_ino  # an environment must not cross a fork
    with _environments_lock:
        environment = _environments.get(key)
        if environment is None or (create and environment.env.flags()["readonly"]):
            environment = Environment(_open(place.path, **options), create=create)
            _environments[key] = environment
        environment.users += 1
    return Segment(place, key, environment)


def _release(key: tuple[int, ...]) -> None:
    with _environments_lock:
        environment = _environments[key]
        environment.users -= 1
        if environment.users == 0:
            del _environments[key]
            environment.env.close()


def _open(path: Path, **options: Any) -> Any:
    return lmdb.open(str(path), max_dbs=TABLES_MAX, max_readers=READERS_MAX, readahead=False, **options)


# -- making, growing, dropping --------------------------------------------------------------------------------------------


def make_segment(log: Path, first_offset: int, map_bytes_max: int, tables_of: Segment | None = None) -> Place:
    """Make a segment without records, with the tables of another, and return where it is: there whole or not at all.

    LMDB writes a new file's first pages without waiting for the disk: a power cut then leaves a file that nobody can
    open. So the segment is made beside, synced, and moved into place; and since a file is lost with its name, the
    directories that lead to it are synced too.
    """
    draft = log / layout.DRAFT
    layout.remove(draft)
    draft.mkdir(parents=True)
    env = new_environment(draft, map_bytes_max)
    try:
        if tables_of is not None:
            # Without its lock: only the thread that is here lets its map grow, and others may read meanwhile.
            with tables_of.env.begin(buffers=True) as source:
                write_growing(env, map_bytes_max, lambda txn: copy_tables(tables_of, source, env, txn))
        env.sync(True)
    finally:
        env.close()
    (draft / "lock.mdb").unlink()
    layout.sync(draft)
    place = layout.place_at(log, first_offset)
    os.rename(draft, place.path)
    layout.sync(log)
    return place


def new_environment(path: Path, map_bytes_max: int = MAP_BYTES_MIN) -> Any:
    """Return an environment with empty tables that is not synced until its `sync(True)`."""
    env = _open(path, map_size=min(MAP_BYTES_MIN, map_bytes_max), sync=False)
    for name in (LOG, *(table.value.encode() for table in Table)):
        env.open_db(name)
    return env


def copy_tables(segment: Segment, source: Any, target: Any, txn: Any) -> None:
    """Copy all tables, as the transaction `source` sees them, in a transaction of another environment."""
    for table in segment.tables:
        into = txn.cursor(target.open_db(table.value.encode(), txn=txn))
        into.putmulti(segment.pairs(source, table), append=True)


def write_growing(env: Any, map_bytes_max: int, write: Callable[[Any], None], lock: Any = None) -> None:
    """Carry out a write transaction, doubling the map as often as it is full: whoever waits sees latency only.

    `lock`, held while the map grows, keeps read transactions of this process away. Raises lmdb.MapFullError when the
    map is as large as it may be.
    """
    while True:
        try:
            with env.begin(write=True) as txn:
                write(txn)
            return
        except lmdb.MapFullError:
            map_bytes = env.info()["map_size"]
            if map_bytes >= map_bytes_max:
                raise
            with lock or nullcontext():
                env.set_mapsize(min(2 * map_bytes, map_bytes_max))


def _offset(key: bytes) -> int:
    return int.from_bytes(key, "big")
