"""The LMDB log: one environment, one writing thread, any number of readers in any process.

Durability is LMDB's own: copy-on-write pages, then fdatasync, then a synchronous write of the meta page (sync and
metasync stay on: without metasync the last acknowledged commit can be lost in a power cut). writemap stays off: with
it a full disk is a SIGBUS. When `commit` returns, its writes are on disk; when it raises, none of them is, and the
process must stop, because memory is ahead of the disk from then on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb
import msgspec

from lightning_bus.broker.core import Snapshot
from lightning_bus.errors import CallError, Conflict, StorageError
from lightning_bus.log.codec import decode_record, encode_record, offset_key
from lightning_bus.messages import Rollout
from lightning_bus.records import ProducerMark, Record, Table, Write
from lightning_bus.resources import Resource

LOG = b"log"
TABLES = tuple(table.value.encode() for table in Table)
READERS_MAX = 512
FULL_BYTES = 64 << 20  # with less than this free, a disk counts as full
RECORDS_PER_READ = 1024  # a read transaction is never held longer than this: an old one would pin freed pages


class LogWriter:
    """The only writer of a log. `commit` must always be called from the same thread; reads may come from others."""

    def __init__(self, path: Path, *, map_bytes_max: int) -> None:
        self.path = path
        self._lock = _lock_writer(path)
        try:
            if not (path / "data.mdb").exists():
                _create(path, map_bytes_max)
            self._env: Any = _open(path, map_bytes_max)
            self._env.reader_check()  # readers that died hold their slot until someone looks
            self._log: Any = self._env.open_db(LOG)
            self._tables: dict[Table, Any] = {table: self._env.open_db(table.value.encode()) for table in Table}
        except (lmdb.Error, OSError) as exc:
            self._lock.close()
            raise _storage_error(path, "open", exc) from exc

    def commit(self, writes: Sequence[Write]) -> None:
        """Make all writes durable in one transaction. Raises StorageError, having written nothing."""
        try:
            with self._env.begin(write=True) as txn:
                for write in writes:
                    if isinstance(write, Record):
                        fresh = txn.put(offset_key(write.offset), encode_record(write), db=self._log, append=True)
                        assert fresh, f"offset {write.offset} is taken"
                    else:
                        txn.put(write.key, write.value, db=self._tables[write.table])
        except (lmdb.Error, OSError) as exc:
            raise _storage_error(self.path, "write to", exc) from exc

    def load(self) -> Snapshot:
        """Return what a broker needs to go on where the log ends. Raises StorageError when a table is damaged."""
        try:
            with self._env.begin() as txn:
                return Snapshot(
                    next_offset=_end_offset(txn, self._log),
                    rollouts=[_decode(value, Rollout) for _, value in self._pairs(txn, Table.ROLLOUTS)],
                    producers={
                        key.decode(): _decode(value, ProducerMark) for key, value in self._pairs(txn, Table.PRODUCERS)
                    },
                    cursors={key.decode(): _decode(value, int) for key, value in self._pairs(txn, Table.CURSORS)},
                    resources=[_decode(value, Resource) for _, value in self._pairs(txn, Table.RESOURCES)],
                )
        except (lmdb.Error, msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise StorageError(
                f"the log {self.path} is damaged: {exc}. Its records may still be whole: lightning-bus verify says which. "
                "Restore it from a backup, or choose another run name."
            ) from exc

    def read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        """Return encoded records from `offset` on, about bytes_max of them, and the offset after the log's last."""
        with self._env.begin() as txn:
            return _read(txn, self._log, offset, bytes_max), _end_offset(txn, self._log)

    def close(self) -> None:
        self._env.close()
        self._lock.close()

    def _pairs(self, txn: Any, table: Table) -> Iterator[tuple[bytes, bytes]]:
        yield from txn.cursor(self._tables[table])


class LogReader:
    """A log opened read-only, beside its writer or after it."""

    def __init__(self, path: Path) -> None:
        if not (path / "data.mdb").exists():
            raise CallError(f"{path} holds no log (no data.mdb in it). Give a run's directory, such as runs/calc.")
        try:
            # map_size 0 is the writer's own; lmdb's default of 10 MiB would end the reader when the log outgrows it.
            self._env: Any = lmdb.open(
                str(path), readonly=True, map_size=0, max_dbs=len(TABLES) + 1, max_readers=READERS_MAX, readahead=False
            )
            self._log: Any = self._env.open_db(LOG, create=False)
            self._tables: dict[Table, Any] = {t: self._env.open_db(t.value.encode(), create=False) for t in Table}
        except lmdb.Error as exc:
            raise _storage_error(path, "read", exc) from exc

    @property
    def end_offset(self) -> int:
        """The offset after the last record."""
        with self._env.begin() as txn:
            return _end_offset(txn, self._log)

    def records(self, offset: int = 0) -> Iterator[Record]:
        """Yield the records from `offset` to the end of the log as it is now. Raises RemoteProtocolError on a damaged one."""
        for value in self.values(offset):
            yield decode_record(value)

    def values(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the encoded records from `offset` on."""
        while True:
            with self._env.begin() as txn:
                cursor = txn.cursor(self._log)
                if not cursor.set_range(offset_key(offset)):
                    return
                batch = [(key, bytes(value)) for (key, value), _ in zip(cursor, range(RECORDS_PER_READ), strict=False)]
            yield from (value for _, value in batch)
            offset = int.from_bytes(batch[-1][0], "big") + 1

    def rollouts(self) -> Iterator[Rollout]:
        """Yield where each rollout stands, by id."""
        yield from self._values_of(Table.ROLLOUTS, Rollout)

    def resources(self) -> Iterator[Resource]:
        """Yield every published resource, by name and version."""
        yield from self._values_of(Table.RESOURCES, Resource)

    def close(self) -> None:
        self._env.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _values_of(self, table: Table, kind: Any) -> Iterator[Any]:
        with self._env.begin() as txn:
            values = [bytes(value) for _, value in txn.cursor(self._tables[table])]
        for value in values:
            yield _decode(value, kind)


def _read(txn: Any, log: Any, offset: int, bytes_max: int) -> list[bytes]:
    values: list[bytes] = []
    size = 0
    cursor = txn.cursor(log)
    if cursor.set_range(offset_key(offset)):
        for _, value in cursor:
            size += len(value)
            if values and (size > bytes_max or len(values) >= RECORDS_PER_READ):
                break
            values.append(bytes(value))
    return values


def _end_offset(txn: Any, log: Any) -> int:
    cursor = txn.cursor(log)
    return int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 0


def _decode(value: bytes, kind: Any) -> Any:
    return msgspec.msgpack.decode(value, type=kind)


def _open(path: Path, map_bytes_max: int) -> Any:
    return lmdb.open(
        str(path), map_size=map_bytes_max, max_dbs=len(TABLES) + 1, max_readers=READERS_MAX, readahead=False
    )


def _create(path: Path, map_bytes_max: int) -> None:
    """Make an empty log that is there whole or not at all.

    LMDB writes a new file's first pages without waiting for the disk: a power cut then leaves a file that nobody can
    open. So the file is made beside, synced, and moved into place; and since a file is lost with its name, the
    directories that lead to it are synced too.
    """
    draft = path / ".creating"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    env = _open(draft, map_bytes_max)
    for name in (LOG, *TABLES):
        env.open_db(name)
    env.sync(True)
    env.close()
    os.replace(draft / "data.mdb", path / "data.mdb")
    shutil.rmtree(draft)
    for directory in (path, path.parent, path.parent.parent):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock_writer(path: Path) -> Any:
    """Keep a second broker away from this log. The kernel lets go of the lock when this process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "writer.lock", "w")  # noqa: SIM115 - held as long as the writer lives
    except OSError as exc:
        raise _storage_error(path, "open", exc) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise Conflict(f"{path} is being written by another broker. Stop it, or choose another run name.") from exc
    return lock


def _storage_error(path: Path, verb: str, exc: Exception) -> StorageError:
    if isinstance(exc, lmdb.MapFullError):
        return StorageError(
            f"cannot {verb} the log {path}: {exc}. It has reached [broker] map_bytes_max. Everything acknowledged so far is safe. "
            "Raise that key and start again: the run goes on where it was."
        )
    free = shutil.disk_usage(path).free if os.path.exists(path) else 0
    # LMDB says EIO for a write that a full disk cut short as well as for a disk that is failing.
    if free > FULL_BYTES and "Input/output error" in str(exc):
        return StorageError(
            f"cannot {verb} the log {path}: {exc}, with {free / 1e6:.0f} MB free: the disk or its filesystem is failing, and what it "
            "says it has written may not be there. Look at the kernel's log (dmesg), copy the directory elsewhere, and only "
            "then start again."
        )
    return StorageError(
        f"cannot {verb} the log {path}: {exc} ({free / 1e6:.1f} MB free on that disk). Everything acknowledged so far is safe. "
        "You can: 1) free space on the disk, 2) start again: the run goes on where it was."
    )
