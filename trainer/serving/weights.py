"""Weights in a file, on their way from the trainer to whoever serves.

    trainer (slots.py) writes the file  ─►  WeightFile says what is in it  ─►  engine maps it, checks it, copies it

What always holds: the file is safetensors, every tensor under the model's own name, a tied one once; its header
carries a stamp which is wiped before a byte changes and set when all have, so a reader that finds the announced stamp
before and after it has read these weights and no others.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import crc32c
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.serving.errors import WeightsRefusedError, WeightUpdateError

LENGTH_BYTES = 8  # of the header's length, at the start of a safetensors file
ALIGNMENT_BYTES = 64  # of the first tensor
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
NO_STAMP = "-" * 32  # while a file is written; as long as a stamp


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file and what it should hold; the fields are the body of /update_weights.

    version                     whose weights these are
    names, dtype_names, shapes  of the tensors, in one order; a tied tensor once, under its first name
    bytes                       of the tensors, without the file's header
    base                        "" where all of the file is named, else the version to which the rest is unchanged
    stamp                       what the file's header says as long as it holds these weights
    checksum                    CRC-32 of all tensors' bytes in this order; "" where the stamp is enough
    """

    path: Path
    version: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bytes: int
    base: str = ""
    stamp: str = ""
    checksum: str = ""

    def update_info(self) -> dict[str, object]:
        return {**asdict(self), "path": str(self.path)}

    def with_checksum(self) -> WeightFile:
        """The same, with the checksum of what the file holds now. Reads all of it: for a first push, and on demand."""
        return replace(self, checksum=_crc32(_map(self.path).tensors(self.names).values()))

    def only(self, names: Collection[str], *, base: str) -> WeightFile:
        """The same file, of which an engine that serves version `base` need only take these tensors."""
        kept = [at for at, name in enumerate(self.names) if name in names]
        return replace(
            self,
            names=[self.names[at] for at in kept],
            dtype_names=[self.dtype_names[at] for at in kept],
            shapes=[self.shapes[at] for at in kept],
            base=base,
        )


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """One checksum over names, dtypes, shapes and bytes, in the order of the names: says which weights these are."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = crc32c.crc32c(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}".encode(), crc)
        crc = crc32c.crc32c(raw_bytes(tensor), crc)
    return f"crc32c:{crc:08x}"


def changed_names(names: Collection[str], frozen: Collection[str]) -> set[str]:
    """The names to send where those of `frozen` never change.

    Engines fuse tensors of one layer (query, key and value; all experts), so a layer goes whole or not at all.
    """
    changed = {_layer(name) for name in names if name not in frozen}
    return {name for name in names if _layer(name) in changed}


# --- the embedded engine's side ---


def served_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor a push replaces, by name: parameters and saved buffers, tied ones once under their first name."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in saved}


@dataclass(frozen=True, slots=True)
class StagedWeights:
    """Tensors that were checked and wait to be copied; they are views of the file, so look at it before and after."""

    tensors: dict[str, Tensor]
    file: WeightFile
    mapped: Mapped

    def check(self) -> None:
        """Raise WeightUpdateError when the file was written again since it was announced."""
        found = self.mapped.stamp()
        if found != self.file.stamp:
            raise WeightUpdateError(
                f"{self.file.path} is stamped {found!r}, announced was {self.file.stamp!r}: it changed since. Push again."
            )


def read_weights(file: WeightFile, expected: Mapping[str, Tensor], version: str = "") -> StagedWeights:
    """The file's tensors, mapped, after checking them against its own description and `expected`.

    version  of the weights served now, on which a file with a `base` builds

    Raises WeightsRefusedError naming what does not fit; nothing of `expected` is touched.
    """
    announced = dict(zip(file.names, zip(file.dtype_names, file.shapes, strict=True), strict=True))
    unknown = sorted(announced.keys() - expected.keys())
    missing = [] if file.base else sorted(expected.keys() - announced.keys())
    if unknown or missing:
        raise WeightsRefusedError(
            f"{file.path}: missing {missing[:3]}, unknown {unknown[:3]}. Send the served model's names."
        )
    if file.base and file.base != version:
        raise WeightsRefusedError(
            f"{file.path} builds on version {file.base!r}, served is {version!r}. Push all tensors."
        )
    _compare(file.path, {name: (dtype, list(shape)) for name, (dtype, shape) in announced.items()}, expected)
    mapped = _map(file.path)
    tensors = mapped.tensors()
    if not (announced.keys() <= tensors.keys() if file.base else announced.keys() == tensors.keys()):
        raise WeightsRefusedError(f"{file.path} holds {len(tensors)} tensors, its description names {len(file.names)}.")
    tensors = {name: tensors[name] for name in file.names}
    _compare(file.path, {name: (dtype_name(t.dtype), list(t.shape)) for name, t in tensors.items()}, expected)
    if file.checksum:
        _check_values(file, tensors)
    staged = StagedWeights(tensors, file, mapped)
    try:
        staged.check()
    except WeightUpdateError as exc:
        raise WeightsRefusedError(str(exc)) from exc
    return staged


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name, as vLLM's weight checker reports them."""
    return {name: hashlib.sha256(raw_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}


# --- the format ---


class Layout:
    """Where each tensor lies in a file; the header has the same length for every stamp."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        owners: dict[tuple[int, int], str] = {}
        wire = {
            name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            for name, tensor in tensors.items()
        }
        end = 0
        # Wide elements first, so that every tensor lies at a multiple of its element's size.
        for name in sorted(tensors, key=lambda name: -wire[name].itemsize):
            tensor = tensors[name]
            owner = owners.setdefault((tensor.data_ptr(), tensor.nbytes), name)
            if owner != name and tensor.numel():
                raise WeightsRefusedError(
                    f"{name!r} and {owner!r} are one tensor. Send tied weights once, under one name."
                )
            size = tensor.numel() * wire[name].itemsize
            self.entries[name] = {
                "dtype": DTYPE_CODES[wire[name]],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + size],
            }
            end += size
        self.bytes = end

    def header(self, stamp: str) -> bytes:
        body = json.dumps({"__metadata__": {"stamp": stamp}, **self.entries}).encode()
        body += b" " * (-(len(body) + LENGTH_BYTES) % ALIGNMENT_BYTES)
        return len(body).to_bytes(LENGTH_BYTES, "little") + body


class Mapped:
    """A weight file in memory. Its tensors are views: they change when somebody writes the file.

    Raises OSError when it cannot be opened and ValueError when it is not such a file.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        with path.open("r+b" if writable else "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            # Private where we only read: torch wants memory that it could write to.
            self._memory = mmap.mmap(opened.fileno(), size, flags=mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE)
        length = int.from_bytes(self._memory[:LENGTH_BYTES], "little")
        self._start = LENGTH_BYTES + length
        if self._start > size:
            raise ValueError(f"its header of {length} bytes does not fit into {size}")
        self._entries: dict[str, Any] = self._header()
        self._entries.pop("__metadata__", None)
        if any(self._start + entry["data_offsets"][1] > size for entry in self._entries.values()):
            raise ValueError(f"its tensors do not fit into {size} bytes")

    def stamp(self) -> str:
        """What the header says, as it is now, about who wrote the file; "" where nobody stamped it."""
        return str(self._header().get("__metadata__", {}).get("stamp", ""))

    def set_stamp(self, layout: Layout, stamp: str) -> None:
        self._memory[: self._start] = layout.header(stamp)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Views of the file by name, in the file's order, or in that of `names`."""
        return {name: self._tensor(self._entries[name]) for name in (self._entries if names is None else names)}

    def fits(self, layout: Layout) -> bool:
        """Whether the layout's header and tensors would lie where this file's do."""
        return self._entries == layout.entries and self._start == len(layout.header(NO_STAMP))

    def _header(self) -> dict[str, Any]:
        return json.loads(self._memory[LENGTH_BYTES : self._start])

    def _tensor(self, entry: dict[str, Any]) -> Tensor:
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._start + begin, count=end - begin)
        return raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def describe(path: Path, version: str, stamp: str, tensors: Mapping[str, Tensor]) -> WeightFile:
    """What an engine is told about a file of these tensors; only their names, dtypes and shapes are looked at."""
    return WeightFile(
        path=path,
        version=version,
        names=list(tensors),
        dtype_names=[dtype_name(tensor.dtype) for tensor in tensors.values()],
        shapes=[list(tensor.shape) for tensor in tensors.values()],
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        stamp=stamp,
    )


def _layer(name: str) -> tuple[str, ...]:
    """What a tensor belongs to: everything up to the first number in its name, or itself where it has none."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    return tuple(parts[: numbers[0] + 1]) if numbers else (name,)


def _map(path: Path) -> Mapped:
    try:
        return Mapped(path)
    except (OSError, ValueError) as exc:
        raise WeightsRefusedError(f"{path} cannot be read: {exc}. Write it again and push.") from exc


def _compare(path: Path, found: Mapping[str, tuple[str, list[int]]], expected: Mapping[str, Tensor]) -> None:
    for name, (dtype, shape) in found.items():
        served = dtype_name(expected[name].dtype), list(expected[name].shape)
        if (dtype, shape) != served:
            raise WeightsRefusedError(
                f"{path}: {name} is {dtype} {shape}, served is {served[0]} {served[1]}. "
                "Push weights of the served model."
            )


def _check_values(file: WeightFile, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float32).item()):
            raise WeightsRefusedError(f"{file.path}: {name} holds NaN or infinity. Roll the trainer back one step.")
    found = _crc32(tensors.values())
    if found != file.checksum:
        raise WeightsRefusedError(
            f"{file.path} has checksum {found}, announced was {file.checksum}: it changed since. Push again."
        )


def _crc32(tensors: Iterable[Tensor]) -> str:
    # CRC-32 rather than the faster CRC-32C because vLLM's environment has no other than zlib's.
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(raw_bytes(tensor), crc)
    return f"crc32:{crc:08x}"


def raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
