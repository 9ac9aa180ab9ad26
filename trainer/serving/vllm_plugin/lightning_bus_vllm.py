"""vLLM's side of a weight push through a file: the weight-transfer engine "lightning_shm", a vLLM plugin.

    start_weight_update → update_weights (map the file, check it) → finish_weight_update (overwrite)

What always holds: start and update touch no served tensor, so whatever they refuse, or a trainer that dies after them,
leaves the old weights serving; only finish overwrites, and a finish that fails says so and refuses everything after it,
because half of the model may be new. The file is safetensors, in shared memory or in any directory that this machine
sees too; its header carries a stamp that the writer changes before it touches a byte, so a file that changed while it
was read is found out.

This module runs in vLLM's processes and environment. It imports torch and vllm, and nothing of the package beside which
it lies; the directory that holds it goes on PYTHONPATH.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

BACKEND = "lightning_shm"
HEADER_LENGTH_BYTES = 8
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def register() -> None:
    """Make the backend known; vLLM calls this in each of its processes, possibly more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "FileWeightTransferEngine")


class RefusedError(ValueError):
    """What was offered does not fit. Nothing was overwritten; the old weights serve on."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """A file needs no meeting point, so there is nothing to agree on."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """What lies where. Names, dtypes and shapes are the trainer's; the file's own header must agree.

    version   which weights these are; remembered, so that the next update may build on them
    base      "" where the file holds the whole model, else the version whose other tensors are kept
    stamp     what the file's header says while nobody writes to it
    checksum  CRC-32 of all tensors' bytes in the order of `names`, "crc32:" before it; "" where it need not be checked
    abandon   nothing is offered: an update that a dead trainer left open ends
    """

    path: str = ""
    version: str = ""
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    bytes: int = 0
    base: str = ""
    stamp: str = ""
    checksum: str = ""
    abandon: bool = False


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Reads weight files; see the top of this module."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._expected = _checkpoint_tensors(Path(self.model_config.model))
        if getattr(self.model_config.hf_config, "tie_word_embeddings", False):
            self._expected.pop("lm_head.weight", None)  # some checkpoints hold it twice; it travels once
        self._mappings: dict[tuple[int, int], WeightMapping] = {}
        self._staged: tuple[FileUpdateInfo, WeightMapping] | None = None
        self._version = ""  # of the last update that went through
        self._broken = ""  # why this replica must be restarted

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        if self._broken:
            raise RuntimeError(f"an earlier update failed halfway ({self._broken}). Restart this replica.")
        self._staged = None

    def update_weights(self, update_info: dict[str, object]) -> None:
        # Not the base class's: that one waits for an accelerator, which a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Map the file and check all of it that can be checked. Raises RefusedError; nothing is overwritten."""
        if update_info.abandon:
            raise RefusedError("the open update was abandoned, as asked.")
        mapping = self._map(Path(update_info.path))
        _check(update_info, mapping, self._expected, self._version)
        self._staged = (update_info, mapping)

    def finish_weight_update(self) -> None:
        """Load what was staged. Raises RefusedError having done nothing, or anything else having done half of it."""
        staged, self._staged = self._staged, None
        if staged is None:
            raise RefusedError("the open update brought no weights. Send /update_weights before finishing.")
        info, mapping = staged
        if mapping.stamp() != info.stamp:
            raise RefusedError(f"{info.path} has been written again since it was announced. Push again.")
        began = time.perf_counter()
        try:
            self._load(mapping, info.names)
            if mapping.stamp() != info.stamp:
                raise RuntimeError(f"{info.path} was written while it was read")
        except BaseException as exc:
            self._broken = f"{type(exc).__name__}: {exc}"
            raise RuntimeError(f"the served weights may be half new. Restart this replica. {self._broken}") from exc
        self._version = info.version
        logger.info("version %s: %d tensors, %.3f s", info.version, len(info.names), time.perf_counter() - began)

    def shutdown(self) -> None:
        self._staged = None
        self._mappings.clear()

    def _map(self, path: Path) -> WeightMapping:
        """The file's mapping; a file in a slot that is written again and again keeps the one that it has."""
        try:
            entry = path.stat()
            key = (entry.st_dev, entry.st_ino)
            known = self._mappings.get(key)
            if known is None or known.bytes != entry.st_size:
                known = WeightMapping(path)
                self._mappings = {**dict(list(self._mappings.items())[-1:]), key: known}  # two slots take turns
            known.read_header()
        except (OSError, ValueError) as exc:
            raise RefusedError(f"{path} cannot be read here: {exc}. Write it again and push.") from exc
        return known

    def _load(self, mapping: WeightMapping, names: list[str]) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        with torch.no_grad(), disable_mtp_completeness_check():
            initialize_layerwise_reload(self.model)
            self.model.load_weights(mapping.tensors(names))
            finalize_layerwise_reload(self.model, self.model_config)
            # On a CPU a head that is tied to the embedding multiplies by a packed copy of it, which the reload passes over.
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


class WeightMapping:
    """A safetensors file in memory. Its tensors are views of the file: they change when it is written."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.bytes = os.fstat(file.fileno()).st_size
            # Shared and copy-on-write at once does not exist: torch wants writable memory, we never write.
            self._memory = mmap.mmap(file.fileno(), self.bytes, flags=mmap.MAP_PRIVATE)
        self._header: dict[str, dict[str, object]] = {}
        self._start = 0

    def read_header(self) -> None:
        """Parse the header anew. Raises ValueError when it is none."""
        length = int.from_bytes(self._memory[:HEADER_LENGTH_BYTES], "little")
        self._start = HEADER_LENGTH_BYTES + length
        if self._start > self.bytes:
            raise ValueError(f"its header of {length} bytes does not fit into {self.bytes}")
        self._header = json.loads(self._memory[HEADER_LENGTH_BYTES : self._start])
        self._header.pop("__metadata__", None)

    def stamp(self) -> str:
        """What the header says about who wrote it, as it is now."""
        metadata = json.loads(self._memory[HEADER_LENGTH_BYTES : self._start]).get("__metadata__", {})
        return metadata.get("stamp", "")

    def describe(self) -> dict[str, tuple[str, list[int]]]:
        """Dtype and shape of every tensor in the file."""
        return {
            name: (DTYPES.get(entry["dtype"], entry["dtype"]), entry["shape"]) for name, entry in self._header.items()
        }  # type: ignore[index,misc,call-overload]

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            entry = self._header[name]
            begin, end = entry["data_offsets"]  # type: ignore[misc]
            dtype = getattr(torch, DTYPES[entry["dtype"]])  # type: ignore[index]
            if begin == end:
                yield name, torch.empty(entry["shape"], dtype=dtype)  # type: ignore[call-overload]
                continue
            raw = torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._start + begin, count=end - begin)
            yield name, raw.view(dtype).view(entry["shape"])  # type: ignore[call-overload]


def _check(
    info: FileUpdateInfo, mapping: WeightMapping, expected: dict[str, tuple[str, list[int]]], version: str
) -> None:
    """Compare announcement, file and served model. Raises RefusedError naming the first thing that does not fit."""
    found = mapping.describe()
    announced = {
        name: (dtype, shape) for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True)
    }
    if info.base:
        found = {name: entry for name, entry in found.items() if name in announced}
    if announced != found:
        odd = sorted(name for name in announced.keys() | found.keys() if announced.get(name) != found.get(name))
        raise RefusedError(f"{info.path} does not hold what was announced, {odd[:3]} among it. Push again.")
    if info.base and info.base != version:
        raise RefusedError(f"these weights build on version {info.base!r}, here is {version!r}. Push all tensors.")
    if expected:
        unknown = sorted(found.keys() - expected.keys())
        missing = [] if info.base else sorted(expected.keys() - found.keys())
        if unknown or missing:
            raise RefusedError(f"missing {missing[:3]}, unknown {unknown[:3]}. Send the served checkpoint's names.")
    for name, (_, shape) in found.items():
        if expected and shape != expected[name][1]:
            raise RefusedError(f"{name} has shape {shape}, served is {expected[name][1]}. Push weights of this model.")
    if mapping.stamp() != info.stamp:
        raise RefusedError(f"{info.path} is stamped {mapping.stamp()!r}, announced was {info.stamp!r}. Push again.")
    if info.checksum:
        crc = 0
        for _, tensor in mapping.tensors(info.names):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                raise RefusedError(f"{info.path} holds NaN or infinity. Roll the trainer back one step.")
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
        if f"crc32:{crc:08x}" != info.checksum:
            raise RefusedError(f"{info.path} has checksum crc32:{crc:08x}, announced was {info.checksum}. Push again.")


def _checkpoint_tensors(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes in the headers of the served checkpoint; empty where it is not a directory of them."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
        mapping = WeightMapping(path)
        mapping.read_header()
        found |= mapping.describe()
    return found
