"""A disk under a log, as the process sees it and as a power cut would leave it, told by the trace that shim.c made.

Files and directories each have two contents: what the process sees, and what is certain to be on disk. Everything
synced is. Of what was written to a file since, anything may be there and anything may be missing, in no order, torn at
each 512 bytes. Of what was done to a directory's names since that directory was synced, any beginning may be there: file
systems journal names in order, but one directory's need not wait for another's, nor for the files that they name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

SECTOR = 512  # what a disk writes whole or not at all
_ENTRY = struct.Struct("<BB6xQQQ")


class Entry(NamedTuple):
    """One line of the trace; shim.c says what the kinds mean."""

    kind: str
    durable: bool
    inode: int
    offset: int
    length: int
    data: bytes

    @property
    def paths(self) -> list[Path]:
        return [Path(path.decode()) for path in self.data.split(b"\0")]


def read_trace(path: Path) -> Iterator[Entry]:
    """Yield the entries of a trace."""
    trace = path.read_bytes()
    at = 0
    while at < len(trace):
        kind, durable, inode, offset, length = _ENTRY.unpack_from(trace, at)
        at += _ENTRY.size
        data = b"" if chr(kind) in "TSE" else trace[at : at + length]
        at += len(data)
        yield Entry(chr(kind), bool(durable), inode, offset, length, data)


class Disk:
    """All that a process made in one directory, which is taken to be on disk itself."""

    def __init__(self, root: Path) -> None:
        self._root_path = root
        self._root = Directory()
        self._files: dict[int, File] = {}  # by inode, of which a file that is gone leaves its number to the next

    def take(self, entry: Entry) -> None:
        """Let a call of the process happen."""
        if entry.kind in "WST":
            self._files[entry.inode].take(entry)
        elif entry.kind == "C":
            self._files[entry.inode] = File()
            self._parent(entry.paths[0]).set(entry.paths[0].name, self._files[entry.inode])
        elif entry.kind == "M":
            self._parent(entry.paths[0]).set(entry.paths[0].name, Directory())
        elif entry.kind in "UX":
            self._parent(entry.paths[0]).set(entry.paths[0].name, None)
        elif entry.kind == "R":
            source, target = entry.paths
            assert source.parent == target.parent, (
                "a move between directories: tell this model what that leaves on disk"
            )
            self._parent(source).rename(source.name, target.name)
        elif entry.kind == "D" and entry.paths[0] != self._root_path:
            directory = self._parent(entry.paths[0]).seen[entry.paths[0].name]
            assert isinstance(directory, Directory)
            directory.sync()
        elif entry.kind == "D":
            self._root.sync()

    def after_power_loss(self, dice: Random, under_way: Entry | None) -> dict[Path, bytes | None]:
        """Return what a power cut could leave now, while this call is under way: the files, by path, and directories (None)."""
        left: dict[Path, bytes | None] = {}
        self._collect(self._root, Path(), left, dice, under_way)
        return left

    def _collect(
        self, directory: Directory, path: Path, left: dict[Path, bytes | None], dice: Random, under_way: Entry | None
    ) -> None:
        for name, node in directory.after_power_loss(dice).items():
            if isinstance(node, Directory):
                left[path / name] = None
                self._collect(node, path / name, left, dice, under_way)
            else:
                writing = under_way is not None and under_way.kind == "W" and self._files[under_way.inode] is node
                left[path / name] = node.after_power_loss(dice, under_way if writing else None)

    def _parent(self, path: Path) -> Directory:
        directory = self._root
        for name in path.relative_to(self._root_path).parts[:-1]:
            found = directory.seen[name]
            assert isinstance(found, Directory)
            directory = found
        return directory


class Directory:
    """Names, as the process sees them and as they are on disk."""

    def __init__(self) -> None:
        self.seen: dict[str, Directory | File] = {}
        self._versions: list[dict[str, Directory | File]] = [{}]  # on disk first, then after each change since

    def set(self, name: str, node: Directory | File | None) -> None:
        if node is None:
            del self.seen[name]
        else:
            self.seen[name] = node
        self._versions.append(dict(self.seen))

    def rename(self, source: str, target: str) -> None:
        self.seen[target] = self.seen.pop(source)
        self._versions.append(dict(self.seen))

    def sync(self) -> None:
        self._versions = [dict(self.seen)]

    def after_power_loss(self, dice: Random) -> dict[str, Directory | File]:
        """Return the names that are left: all changes as often as none of them, and any beginning."""
        last = len(self._versions) - 1
        return self._versions[dice.choice((0, last, dice.randint(0, last)))]


class File:
    """Bytes, as the process sees them and as they are on disk."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._durable = bytearray()
        self._pending: dict[int, list[tuple[int, bytes]]] = {}  # sector → (write, content) since it was last synced
        self._writes = 0

    def take(self, entry: Entry) -> None:
        """Let a call of the process happen."""
        if entry.kind == "W":
            sectors = self._write(entry)
            if entry.durable:  # its own bytes are on disk now; what other calls wrote is not
                _grow(self._durable, entry.offset + entry.length)
                for sector in sectors:
                    self._put(self._durable, sector, self._pending.pop(sector)[-1][1])
        elif entry.kind == "T":
            raise ValueError(f"the log set its file's size to {entry.length}: tell this model what that leaves on disk")
        elif entry.kind == "S":
            self._durable[:] = self._seen
            self._pending.clear()

    def after_power_loss(self, dice: Random, under_way: Entry | None) -> bytes:
        """Return a file that a power cut could leave now, while this call is under way."""
        pending = {sector: list(versions) for sector, versions in self._pending.items()}
        seen = bytes(self._seen)
        if under_way is not None and under_way.kind == "W":
            self._write(under_way)
            pending, self._pending = self._pending, pending
        file = bytearray(self._durable)
        # How long the file is, is written on its own too. What was written beyond its end is not in it.
        size = dice.choice((len(file), len(self._seen), dice.randint(len(file), len(self._seen))))
        _grow(file, size)
        survives = _survivors(dice)
        for sector, versions in pending.items():
            kept = [content for write, content in versions if survives(write)]
            if kept:
                self._put(file, sector, kept[-1])
        self._seen[:] = seen
        return bytes(file[:size])

    def _write(self, entry: Entry) -> range:
        end = entry.offset + entry.length
        _grow(self._seen, end)
        self._seen[entry.offset : end] = entry.data
        sectors = range(entry.offset // SECTOR, -(-end // SECTOR))
        self._writes += 1
        for sector in sectors:
            content = bytes(self._seen[sector * SECTOR : (sector + 1) * SECTOR])
            self._pending.setdefault(sector, []).append((self._writes, content))
        return sectors

    @staticmethod
    def _put(file: bytearray, sector: int, content: bytes) -> None:
        _grow(file, sector * SECTOR + len(content))
        file[sector * SECTOR : sector * SECTOR + len(content)] = content


def _survivors(dice: Random) -> Callable[[int], bool]:
    """Return who decides, sector by sector, whether a write that was never synced reached the disk all the same."""
    how = dice.choice(("none", "all", "some writes", "some sectors", "most sectors", "few sectors"))
    if how == "some writes":  # whole, in any order
        kept: dict[int, bool] = {}
        return lambda write: kept.setdefault(write, dice.random() < 0.5)
    chance = {"none": 0.0, "all": 1.0, "some sectors": 0.5, "most sectors": 0.95, "few sectors": 0.05}[how]
    return lambda write: dice.random() < chance


def _grow(file: bytearray, size: int) -> None:
    file.extend(bytes(max(0, size - len(file))))
