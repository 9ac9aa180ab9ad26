"""Checkpoints: everything a run needs to go on as if it had never stopped.

    DIRECTORY/step-00000012.safetensors    model/<name>                  weights, tied ones once
                                           optimizer/<name>/<moment>     the optimiser's state
                                           PART/model/…, PART/optimizer/…  the same of a further part: a critic
                                           state                         bytes: CRC, then msgpack of counters,
                                                                         random generators, the caller's `extra`
                                                                         and the CRC of every other tensor

One file, so that a checkpoint appears, and replaces an older one of the same step, in a single rename: it is
written under a hidden name, fsynced, renamed, then its directory fsynced. What was checked when writing is
checked again when reading: a file that the disk has damaged is refused (`load`, `read`) or passed over (`latest`).
Nothing is pickled, so loading runs nobody's code. A directory has one writer, which `writing` sees to.

Where FSDP keeps weights in shards, every rank calls `save` and `load`: saving puts the shards together, one tensor
at a time, and rank 0 writes; loading cuts every rank its shard out of the same file. So a checkpoint does not know
how many ranks made it, and any number of them resumes from it. torch.distributed.checkpoint writes shards in
parallel, but it pickles their index.
"""

import fcntl
import os
import random
import re
import zlib
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.optimize.optimizer import Optimizer, shard_like
from trainer.policy.model import named_weights, sync
from trainer.ranks import lead, led

Part = tuple[torch.nn.Module, Optimizer]

FORMAT = 1
FILE_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `load` hands back besides the restored objects."""

    step: int
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A further model with its optimiser, as it lies in a checkpoint."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    updates: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole checkpoint as it lies on the disk: `weights` and `moments` are mapped, not copied."""

    step: int
    extra: dict[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # the optimiser's
    updates: int
    skipped: int
    generators: dict[str, Any]
    parts: dict[str, StoredPart] = field(default_factory=dict[str, StoredPart])


class _Counters(msgspec.Struct, frozen=True):
    updates: int
    skipped: int


class _State(msgspec.Struct, frozen=True):
    format: int
    step: int
    updates: int
    skipped: int
    generators: dict[str, Any]
    tensors_crc: int
    extra: dict[str, Any]
    parts: dict[str, _Counters] = {}  # absent from checkpoints of before there were parts


def save(
    directory: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, Any],
    *,
    parts: Mapping[str, Part] | None = None,
) -> Path:
    """Write checkpoint `step` durably and return its path. Older ones stay; see `drop_old`.

    extra  anything msgpack can say: stream cursor, groups that wait for their last rollout, counters
    parts  further models with their optimisers, by a name without a slash: {"critic": (critic, its_optimizer)}

    Raises TypeError for an extra that msgpack cannot say, ValueError for a part of another name, and OSError when
    the disk does not take it; all leave earlier checkpoints as they were.
    """
    parts = dict(parts or {})
    for name in parts:
        if not name or "/" in name or name in ("model", "optimizer", "state"):
            raise ValueError(f"a part of a checkpoint cannot be called {name!r}: choose a word such as 'critic'")
    # A part that this process has for itself is no business of the other ranks.
    lead(model, "save", parts=[name for name, (module, _) in parts.items() if led(module)])
    tensors: dict[str, Tensor] = {}
    for name, (module, its_optimizer) in {"": (model, optimizer), **parts}.items():
        prefix = f"{name}/" if name else ""
        tensors |= {f"{prefix}model/{key}": _whole(tensor) for key, tensor in named_weights(module)}
        tensors |= {f"{prefix}optimizer/{key}": _whole(tensor) for key, tensor in its_optimizer.tensors().items()}
    if not _is_writer():
        return path_of(directory, step)
    state = _State(
        format=FORMAT,
        step=step,
        updates=optimizer.updates,
        skipped=optimizer.skipped,
        generators=_generators(),
        tensors_crc=_crc(tensors),
        extra=dict(extra),
        parts={name: _Counters(one.updates, one.skipped) for name, (_, one) in parts.items()},
    )
    return _write(directory, state, tensors)


def save_again(directory: Path, step: int, stored: Stored, extra: Mapping[str, Any]) -> Path:
    """Write what an older checkpoint holds as checkpoint `step`, with another `extra`. Returns and raises as `save`."""
    tensors: dict[str, Tensor] = {}
    for name, part in {"": stored, **stored.parts}.items():
        prefix = f"{name}/" if name else ""
        tensors |= {f"{prefix}model/{key}": tensor for key, tensor in part.weights.items()}
        tensors |= {f"{prefix}optimizer/{key}": tensor for key, tensor in part.moments.items()}
    state = _State(
        format=FORMAT,
        step=step,
        updates=stored.updates,
        skipped=stored.skipped,
        generators=stored.generators,
        tensors_crc=_crc(tensors),
        extra=dict(extra),
        parts={name: _Counters(part.updates, part.skipped) for name, part in stored.parts.items()},
    )
    return _write(directory, state, tensors)


def drop_old(directory: Path, keep: int, spared: Collection[Path] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those in `spared`."""
    safe = {path.resolve() for path in spared}
    for old in _files(directory)[:-keep]:
        if old.resolve() not in safe:
            old.unlink(missing_ok=True)


@contextmanager
def writing(directory: Path) -> Generator[None]:
    """Be the directory's one writer while the context lasts. Raises BlockingIOError while another process is.

    The lock goes with the process, however it ends: a killed trainer's successor is let in at once.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / ".writer", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def path_of(directory: Path, step: int) -> Path:
    """Where checkpoint `step` lies, or would."""
    return directory / f"step-{step:08d}.safetensors"


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole, or None. One that is damaged is passed over, not deleted."""
    for path in reversed(_files(directory)):
        try:
            _read(path)
        except (OSError, ValueError):
            continue
        return path
    return None


def load(
    path: Path, model: torch.nn.Module, optimizer: Optimizer | None, *, parts: Mapping[str, Part] | None = None
) -> Checkpoint:
    """Restore model, optimiser, the parts asked for, and random generators from a checkpoint, bit for bit.

    optimizer  None: the model is wanted, and how it got there is not. A part of the checkpoint that is not asked for is left alone. Raises ValueError, having changed nothing, for a
    checkpoint that is damaged, of another model, or without a part that is asked for, and OSError for one that
    cannot be read.
    """
    together = [name for name, (module, _) in (parts or {}).items() if led(module)]
    lead(model, "load", path=str(path.absolute()), optimizer=optimizer is not None, parts=together)
    stored = read(path)
    wanted: dict[str, tuple[tuple[torch.nn.Module, Optimizer | None], Stored | StoredPart]] = {
        "": ((model, optimizer), stored)
    }
    for name, live in (parts or {}).items():
        if name not in stored.parts:
            raise ValueError(
                f"{path} holds no {name}: it was written by a run without one. Start anew, or go on without"
            )
        wanted[name] = (live, stored.parts[name])
    for (module, its_optimizer), part in wanted.values():
        _check_same_model(path, part.weights, dict(named_weights(module)))
        if its_optimizer is not None:
            its_optimizer.check_tensors(part.moments)
    for (module, its_optimizer), part in wanted.values():
        if its_optimizer is not None:
            its_optimizer.load_tensors(part.moments)
            its_optimizer.updates, its_optimizer.skipped = part.updates, part.skipped
        live_weights = module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in part.weights.items():
                live_weights[name].copy_(shard_like(tensor, live_weights[name]))
    _restore_generators(stored.generators)
    return Checkpoint(step=stored.step, extra=stored.extra)


def read(path: Path) -> Stored:
    """Return what a checkpoint holds, without a model. Raises ValueError when it is damaged, OSError when not there."""
    state, tensors = _read(path)
    return Stored(
        step=state.step,
        extra=state.extra,
        weights=_under(tensors, "model/"),
        moments=_under(tensors, "optimizer/"),
        updates=state.updates,
        skipped=state.skipped,
        generators=state.generators,
        parts={
            name: StoredPart(
                _under(tensors, f"{name}/model/"), _under(tensors, f"{name}/optimizer/"), one.updates, one.skipped
            )
            for name, one in state.parts.items()
        },
    )


def of_model(model: torch.nn.Module, extra: Mapping[str, Any]) -> Stored:
    """Return what a checkpoint of a model that was never trained would hold."""
    return Stored(
        step=0,
        extra=dict(extra),
        weights=dict(named_weights(model)),
        moments={},
        updates=0,
        skipped=0,
        generators=_generators(),
    )


def _write(directory: Path, state: _State, tensors: dict[str, Tensor]) -> Path:
    encoded = msgspec.msgpack.encode(state)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step-*"):  # of a writer that died
        leftover.unlink()
    final = path_of(directory, state.step)
    partial = directory / f".{final.name}.partial"
    state_tensor = _byte_tensor(zlib.crc32(encoded).to_bytes(4, "little") + encoded)
    try:
        save_file({**tensors, "state": state_tensor}, partial)
    except SafetensorError as exc:
        raise OSError(f"checkpoint {partial} could not be written: {exc}. Free space or name another place") from exc
    sync(partial)
    os.replace(partial, final)
    sync(directory)
    return final


def _read(path: Path) -> tuple[_State, dict[str, Tensor]]:
    """The state and the tensors of a checkpoint that is whole. Raises ValueError saying what is wrong with it."""
    try:
        tensors = load_file(path)
        raw = tensors.pop("state").numpy().tobytes()
    except (SafetensorError, KeyError) as exc:
        raise ValueError(f"{path} is not a whole checkpoint ({exc}): use an older one") from exc
    if zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
        raise ValueError(f"{path} is damaged: its state of {len(raw)} bytes has another checksum. Use an older one")
    try:
        state = msgspec.msgpack.decode(raw[4:], type=_State)
    except msgspec.MsgspecError as exc:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}: {exc}") from exc
    if state.format != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state.format}, this version reads {FORMAT}")
    if _crc(tensors) != state.tensors_crc:
        raise ValueError(f"{path} is damaged: its {len(tensors)} tensors have another checksum. Use an older one")
    return state, tensors


def _whole(tensor: Tensor) -> Tensor:
    """The tensor in main memory, put together where it is kept in shards. All ranks must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if _is_writer() else whole.new_empty(0)  # the others need not hold the whole model


def _is_writer() -> bool:
    return not (dist.is_initialized() and dist.get_rank())


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_same_model(path: Path, stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name in sorted(stored.keys() ^ weights.keys()):
        where = "only in the checkpoint" if name in stored else "only in this model"
        raise ValueError(f"{path} is of another model: {name} is {where}")
    for name, weight in weights.items():
        theirs, ours = (tuple(stored[name].shape), stored[name].dtype), (tuple(weight.shape), weight.dtype)
        if theirs != ours:
            raise ValueError(f"{path} is of another model: {name} is {theirs} in the checkpoint and {ours} here")


def _files(directory: Path) -> list[Path]:
    """The checkpoints of a directory, whole or not, oldest first."""
    if not directory.is_dir():
        return []
    steps = {path: FILE_NAME.fullmatch(path.name) for path in directory.iterdir()}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.stem[5:]))


def _crc(tensors: Mapping[str, Tensor]) -> int:
    """One CRC over names, types, shapes and bytes, in the order of the names."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _generators() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()],
        "numpy": [kind, np.asarray(keys, dtype="<u4").tobytes(), *rest],
        "python": random.getstate(),
    }


def _restore_generators(generators: dict[str, Any]) -> None:
    torch.set_rng_state(_byte_tensor(generators["torch"]))
    # A run moved to a machine with other GPUs goes on with fresh GPU generators; the rest stays exact.
    if len(generators["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_byte_tensor(state) for state in generators["cuda"]])
    kind, keys, *rest = generators["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype="<u4"), *rest))
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))


def _byte_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
