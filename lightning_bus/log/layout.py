"""A log on disk is a row of segments, each a whole LMDB environment named by the first offset in it.

    runs/calc/log/
      writer.lock                        held by the broker
      00000000000000000000/data.mdb      sealed: nothing writes to it any more
      00000000000000180224/data.mdb      the newest: records are appended here, and its tables are the state
      .creating/                         the next one, being made; not part of the log

What always holds: a segment appears under its name whole and synced, so all but the newest are sealed for ever, and the
newest holds the state as of its end. The next one takes the tables along, so a segment that was sealed can go without
anybody looking into it. A log from before there were segments is one `data.mdb` in the log's own directory: the first.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import lmdb

from lightning_bus.errors import StorageError

DATA = "data.mdb"
NAME_DIGITS = 20  # of the largest u64, so that names sort as offsets do
DRAFT = ".creating"
DROPPED = ".dropped-"
FULL_BYTES = 64 << 20  # with less than this free, a disk counts as full


class Place(NamedTuple):
    """Where a segment is: the directory that holds its data.mdb."""

    first_offset: int
    path: Path

    @property
    def file(self) -> Path:
        return self.path / DATA


def place_at(log: Path, first_offset: int) -> Place:
    """Return where the segment that begins there belongs."""
    return Place(first_offset, log / f"{first_offset:0{NAME_DIGITS}}")


def find_segments(log: Path) -> list[Place]:
    """Return the segments of the log in this directory, oldest first; none when it holds no log."""
    try:
        names = os.listdir(log)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [Place(int(name), log / name) for name in names if len(name) == NAME_DIGITS and name.isdigit()]
    if DATA in names:
        found.append(Place(0, log))
    return sorted(found)


def drop_segments(log: Path, places: list[Place]) -> None:
    """Forget these segments, oldest first. Readers that have one open go on reading it."""
    hidden: list[Path] = []
    for place in places:
        if place.path == log:  # from before there were segments: its file lies among the others
            place.file.unlink()
            hidden.append(log / "lock.mdb")
        else:
            hidden.append(log / f"{DROPPED}{place.path.name}")
            os.rename(place.path, hidden[-1])
    sync(log)  # now they are gone for good, and in order; a crash below leaves litter, which the next start removes
    for path in hidden:
        remove(path)


def remove_litter(log: Path) -> None:
    """Remove what a crash left of a segment that was being made or dropped."""
    for path in log.iterdir():
        if path.name == DRAFT or path.name.startswith(DROPPED):
            remove(path)


def remove(path: Path) -> None:
    """Remove a segment's directory, or a file; nothing when it is not there."""
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or which names a directory holds, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, verb: str, exc: Exception) -> StorageError:
    """Return the error that tells a person what LMDB or the file system said, and what to do."""
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
