"""Where the trainer puts weights for engines to read: two files in shared memory, or a directory that all machines see.

    store.write(tensors, "12") ─► WeightFile ─► lend ─► the engine reads and copies ─► give_back

What always holds: a file that an engine may be reading is never written; what is not finite is found before anybody is
told of it; memory or disk that is full is an OSError here, at once, and never a signal while a tensor is copied.
"""

from __future__ import annotations

import math
import os
import secrets
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trainer.policy.model import sync
from trainer.serving.errors import WeightsRefusedError
from trainer.serving.weights import DTYPES, NO_STAMP, Layout, Mapped, WeightFile, describe, dtype_name, raw_bytes

# Copied and looked at together, while it is in the cache; and few enough that torch does it on this thread: its threads
# wait for one another after every piece, and beside an engine that wants the same cores that took 20 times as long.
CHUNK_NUMEL = 1 << 14
KEPT_FILES = 2  # of a directory: the newest, and the one that engines may still read


class Store(Protocol):
    """Where weight files go."""

    def write(
        self, tensors: Mapping[str, Tensor], version: str, *, dtype: torch.dtype | None, frozen: Collection[str] = ()
    ) -> WeightFile:
        """Return a new file that holds all of the tensors; floating point ones are cast to `dtype`.

        frozen  names whose values are the same at every call: what holds them already keeps them

        Raises WeightsRefusedError for NaN, infinity or two names of one tensor, and OSError when there is no room;
        older files stay as they are.
        """
        ...

    def lend(self, file: WeightFile, reader: str) -> None:
        """The reader is about to be told of this file."""
        ...

    def give_back(self, file: WeightFile, reader: str) -> None:
        """The reader has a copy of what was in the file and will not look at it again."""
        ...

    def unlink(self) -> None:
        """Remove the files: shared memory outlives the process."""
        ...


class WeightSlots:
    """Two files in shared memory that take turns, so that what engines read is never what is being written.

    A file that somebody may still read is replaced by a new one, any other is written again in place, which spares the
    system the work of finding and clearing memory: half the price of a push.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._slots = [_Slot(directory / f"{name}-{slot}.safetensors") for slot in "ab"]

    def write(
        self,
        tensors: Mapping[str, Tensor],
        version: str,
        *,
        dtype: torch.dtype | None = None,
        frozen: Collection[str] = (),
    ) -> WeightFile:
        """See Store. Goes into the slot that was not written last."""
        layout = Layout(tensors, dtype)
        self._slots.reverse()
        slot = self._slots[0]
        kept = frozen
        if slot.mapped is None or slot.readers or not slot.stamp or not slot.mapped.fits(layout):
            slot.mapped, slot.readers, kept = None, set(), ()
            slot.mapped = _create(slot.path, layout)
        slot.mapped.set_stamp(layout, NO_STAMP)
        slot.stamp = ""
        written = slot.mapped.tensors()
        copies = _Copies()
        for name, target in written.items():
            if name not in kept:
                copies.copy(target, tensors[name], name)
        copies.check()
        slot.stamp = _new_stamp()
        slot.mapped.set_stamp(layout, slot.stamp)
        return describe(slot.path, version, slot.stamp, written)

    def lend(self, file: WeightFile, reader: str) -> None:
        for slot in self._slots:
            if slot.stamp == file.stamp:
                slot.readers.add(reader)

    def give_back(self, file: WeightFile, reader: str) -> None:
        for slot in self._slots:
            if slot.stamp == file.stamp:
                slot.readers.discard(reader)

    def unlink(self) -> None:
        for slot in self._slots:
            slot.mapped = None
            slot.path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Slot:
    path: Path
    mapped: Mapped | None = None  # what this process wrote there
    stamp: str = ""  # of what is in it now; "" after a write that was broken off
    readers: set[str] = field(default_factory=set[str])  # who may look at it still


class WeightDirectory:
    """One file a version in a directory that every engine's machine sees, written whole, then renamed."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._written: list[Path] = []

    def write(
        self,
        tensors: Mapping[str, Tensor],
        version: str,
        *,
        dtype: torch.dtype | None = None,
        frozen: Collection[str] = (),
    ) -> WeightFile:
        """See Store."""
        # A name of its own each time: a network disk takes a file that is replaced away from whoever reads it.
        path = self._directory / f"{self._name}-{version}-{secrets.token_hex(4)}.safetensors"
        file = write_weights(tensors, path, version, dtype=dtype)
        self._written.append(path)
        for old in self._written[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
        self._written = self._written[-KEPT_FILES:]
        return file

    def lend(self, file: WeightFile, reader: str) -> None:
        pass  # a file that is gone stays with whoever has it open

    def give_back(self, file: WeightFile, reader: str) -> None:
        pass

    def unlink(self) -> None:
        for path in self._directory.glob(f"{self._name}-*.safetensors"):
            path.unlink(missing_ok=True)


def write_weights(
    tensors: Mapping[str, Tensor], path: Path, version: str, *, dtype: torch.dtype | None = None
) -> WeightFile:
    """Write a file that is whole and on its disk before it appears under `path`; who has an older one open keeps it.

    Raises as Store.write does.
    """
    layout, stamp = Layout(tensors, dtype), _new_stamp()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    written: dict[str, Tensor] = {}
    copies = _Copies()
    try:
        with temporary.open("wb") as file:
            file.write(layout.header(stamp))
            for name, entry in layout.entries.items():
                target = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                copies.copy(target, tensors[name], name)
                file.write(raw_bytes(target))
                written[name] = target.to("meta")
        copies.check()
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return describe(path, version, stamp, written)


def shm_directory() -> Path:
    """Where weight files go: memory-backed where the system offers it, else the directory for temporary files."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _create(path: Path, layout: Layout) -> Mapped:
    """A new file of the layout's size under `path`, its memory reserved: what is full must say so here, not at a write."""
    header = layout.header(NO_STAMP)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, len(header) + layout.bytes)
            file.write(header)
        mapped = Mapped(temporary, writable=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return mapped


class _Copies:
    """Copies and casts, and refuses what is not finite: from a CPU at once, from a GPU in check(), which waits once."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, torch.dtype], Tensor] = {}

    def copy(self, target: Tensor, source: Tensor, name: str) -> None:
        source = source.detach()
        if _in_memory(source):
            _copy_pieces(target, source, name)
            return
        # Cast and summed up where it is: half the bytes cross over, in one piece, and no value is asked for yet.
        cast = source.to(target.dtype).contiguous()
        if cast.is_floating_point():
            self._sums[name, cast.dtype] = cast.sum(dtype=torch.float32)
        target.copy_(cast)

    def check(self) -> None:
        if self._sums:
            finite = torch.stack(list(self._sums.values())).isfinite().tolist()
            for (name, dtype), is_finite in zip(self._sums, finite, strict=True):
                if not is_finite:
                    raise _not_finite(name, dtype)


def _in_memory(source: Tensor) -> bool:
    return source.device.type == "cpu"


def _copy_pieces(target: Tensor, source: Tensor, name: str) -> None:
    """Copy and cast in pieces that stay in the cache until they have been looked at."""
    pieces = zip(target.view(-1).split(CHUNK_NUMEL), source.contiguous().view(-1).split(CHUNK_NUMEL), strict=True)
    for piece, original in pieces:
        piece.copy_(original)
        if piece.is_floating_point() and not math.isfinite(piece.sum(dtype=torch.float32).item()):
            raise _not_finite(name, target.dtype)


def _not_finite(name: str, dtype: torch.dtype) -> WeightsRefusedError:
    return WeightsRefusedError(f"{name} holds NaN or infinity as {dtype_name(dtype)}. Roll the trainer back one step.")


def _new_stamp() -> str:
    return secrets.token_hex(len(NO_STAMP) // 2)
