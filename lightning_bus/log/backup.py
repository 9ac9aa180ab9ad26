"""A copy of a log, consistent, while it is written to.

Sealed segments are copied as files: nothing changes them. The newest is read as any reader reads it, a piece at a time,
and with the last piece, in the same transaction, come the tables: records and state are of one moment, and no long
transaction holds up the writer. The copy is made beside its target and moved there when it is whole and synced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from lightning_bus.errors import CallError, StorageError
from lightning_bus.log import layout
from lightning_bus.log import segments as s
from lightning_bus.log.codec import offset_key

PIECE_BYTES = 8 << 20
MAP_BYTES_MAX = 1 << 40  # address space


def copy_log(segments: s.Segments, places: Callable[[], tuple[layout.Place, ...]], target: Path) -> int:
    """Copy the log that these segments are into `target` and return the copy's end_offset.

    `places` tells what the log consists of now: it is asked again when retention drops what is being copied. Raises
    CallError when the target is not empty, StorageError when it cannot be written or the log cannot be read.
    """
    try:
        with appearing(target) as draft:
            while True:
                now = places()
                try:
                    for place in now[:-1]:
                        _copy_sealed(place, _directory(place, draft))
                    return _copy_newest(segments, now[-1], _directory(now[-1], draft))
                except (OSError, lmdb.Error):
                    if all(place.file.exists() for place in now):
                        raise
                for path in draft.iterdir():
                    layout.remove(path)
    except (OSError, lmdb.Error) as exc:
        raise StorageError(f"cannot copy the log to {target}: {exc}. The log itself is as it was.") from exc


@contextmanager
def appearing(target: Path) -> Generator[Path]:
    """Give a new directory to fill; at the end of the context it is `target`, whole and synced, or gone.

    Raises CallError when there is something at the target.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CallError(f"{target} exists and is not an empty directory. Nothing is overwritten: give a new one.")
    draft = target.parent / f"{target.name}.part"
    shutil.rmtree(draft, ignore_errors=True)  # of a backup that was interrupted
    draft.mkdir(parents=True)
    try:
        yield draft
        layout.sync(draft)
        os.rename(draft, target)
        layout.sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _directory(place: layout.Place, draft: Path) -> Path:
    """Return the segment's new directory; one that was a lone data.mdb gets a name here."""
    path = layout.place_at(draft, place.first_offset).path
    path.mkdir()
    return path


def _copy_sealed(place: layout.Place, copy: Path) -> None:
    shutil.copyfile(place.file, copy / layout.DATA)
    layout.sync(copy / layout.DATA)
    layout.sync(copy)


def _copy_newest(segments: s.Segments, place: layout.Place, copy: Path) -> int:
    """Copy the segment that is, or was a moment ago, the newest: up to its last record, with the tables as of then."""
    target = s.new_environment(copy)
    log = target.open_db(s.LOG)
    offset = place.first_offset
    whole = False

    def write(txn: Any) -> None:
        txn.cursor(log).putmulti(pairs, append=True)
        if whole:
            s.copy_tables(segment, source, target, txn)

    try:
        while not whole:
            with segments.lock:
                segment = segments.at(place)
                with segment.begin() as source:
                    pairs = _piece(source, segment, offset)
                    offset = int.from_bytes(pairs[-1][0], "big") + 1 if pairs else offset
                    whole = offset == segment.end_offset(source)
                    if whole:
                        s.write_growing(target, MAP_BYTES_MAX, write)
            if not whole:
                s.write_growing(target, MAP_BYTES_MAX, write)
        target.sync(True)
    finally:
        target.close()
    (copy / "lock.mdb").unlink()
    layout.sync(copy)
    return offset


def _piece(txn: Any, segment: s.Segment, offset: int) -> list[tuple[bytes, bytes]]:
    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    cursor = txn.cursor(segment.log)
    if cursor.set_range(offset_key(offset)):
        for pair in cursor:
            pairs.append(pair)
            size += len(pair[1])
            if size >= PIECE_BYTES:
                break
    return pairs
