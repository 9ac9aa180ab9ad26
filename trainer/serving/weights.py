"""New weights on their way from the trainer to whoever serves: one file in shared memory, four HTTP calls.

    write_weights ─► file (slot A or B) ─► pause(keep) → start → update → finish(version) → resume

What holds: a file appears under its name whole or not at all, and carries a checksum of every tensor in it; two
slots take turns, so a server never reads the file being written; everything about a file is checked before the
first served tensor is overwritten; and whatever fails, `resume` is tried, so no push leaves a server standing.
The HTTP calls are vLLM's own; vllm itself is never imported.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anyio
import httpx
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trainer.serving.errors import WeightsRefusedError, WeightUpdateError

CALL_LIMIT_S = 60.0  # of each call of a push; generous for gigabytes, short enough to notice a dead server


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file and what it should hold; the fields are the body of /update_weights.

    names, dtype_names, shapes  of the tensors, in one order; a tied tensor once, under its first name
    checksum                    over names, dtypes, shapes and bytes of all tensors
    bytes                       of the tensors, without the file's header
    """

    path: Path
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    checksum: str
    bytes: int

    def update_info(self) -> dict[str, object]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class PushTimes:
    """What one push took: `seconds` in all, of which generation stood still for `standstill_ms`."""

    seconds: float
    standstill_ms: float


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> WeightFile:
    """Write the tensors as safetensors and return what a reader needs to check them.

    The file is complete and on its medium before it appears under `path`; an older one there stays readable for
    whoever has it open. Raises ValueError when two names share one tensor, OSError when the medium is full.
    """
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    owners: dict[int, str] = {}
    for name, tensor in ordered.items():
        owner = owners.setdefault(tensor.data_ptr(), name)
        if owner != name and tensor.numel():
            raise ValueError(f"{name!r} and {owner!r} are one tensor. Send tied weights once, under one name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(ordered, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return _describe(path, ordered)


def describe_weights(path: Path, checksum: str) -> WeightFile:
    """Describe a file from its own header, for a server that starts with weights it was only told the place of.

    checksum  as it was announced: slots take turns, so by now newer weights may lie under the same name

    Raises WeightsRefusedError when the file cannot be read.
    """
    return replace(_describe(path, _open(path)), checksum=checksum)


def shm_directory() -> Path:
    """Where weight files go: memory-backed where the system offers it, else the directory for temporary files."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


class WeightSlots:
    """Two files that take turns. `write` uses the one that was not written last, so the other may still be read."""

    def __init__(self, directory: Path, name: str) -> None:
        self._paths = [directory / f"{name}-{slot}.safetensors" for slot in "ab"]

    def write(self, tensors: Mapping[str, Tensor]) -> WeightFile:
        """As `write_weights`, into the next slot."""
        self._paths.reverse()
        return write_weights(tensors, self._paths[0])

    def unlink(self) -> None:
        """Remove both files: shared memory outlives the process."""
        for path in self._paths:
            path.unlink(missing_ok=True)


class WeightPush:
    """Pushes weight files to one server over its HTTP control routes."""

    def __init__(self, client: httpx.AsyncClient, base_url: str, *, call_limit_s: float = CALL_LIMIT_S) -> None:
        self._client = client
        self._base_url = base_url.rstrip("/")
        self._call_limit_s = call_limit_s

    async def push(self, file: WeightFile, version: str) -> PushTimes:
        """Make the server answer under `file`'s weights from now on, labelled `version`.

        Generation stands still from the pause to the resume, requests in flight are kept. Raises WeightUpdateError;
        its `served` says whether the server still answers under its old weights or must be restarted.
        """
        began = time.perf_counter()
        started = False
        standing = began
        try:
            await self._post("/pause?mode=keep&clear_cache=false")
            standing = time.perf_counter()
            await self._post("/start_weight_update")
            started = True
            await self._post("/update_weights", {"update_info": file.update_info()})
            await self._post("/finish_weight_update", {"weight_version": version})
        except httpx.HTTPError as exc:
            failed = f"pushing weight version {version!r} to {self._base_url} failed: {_reason(exc)}"
            if isinstance(exc, httpx.HTTPStatusError) and exc.response.status_code == 400:
                raise WeightsRefusedError(f"{failed}. Its old weights keep serving.") from exc
            if not started:
                raise WeightUpdateError(f"{failed}. Its old weights keep serving; push again.") from exc
            way_out = "It may hold half an update: restart it before training on its tokens."
            raise WeightUpdateError(f"{failed}. {way_out}", served=False) from exc
        finally:
            # Shielded: a push that is cancelled here must not leave the server paused for good.
            with anyio.CancelScope(shield=True):
                await self._resume()
        ended = time.perf_counter()
        return PushTimes(seconds=ended - began, standstill_ms=(ended - standing) * 1e3)

    async def current_version(self) -> str:
        """The label of the weights the server answers under. Raises httpx.HTTPError when it does not answer."""
        response = await self._client.get(self._base_url + "/weight_info", timeout=self._call_limit_s)
        return str(response.raise_for_status().json()["weight_version"])

    async def wait_healthy(self, limit_s: float) -> None:
        """Return once the server answers /health. Raises TimeoutError after limit_s with the last reason."""
        reason = "no answer yet"
        with anyio.move_on_after(limit_s):
            while True:
                try:
                    response = await self._client.get(self._base_url + "/health", timeout=self._call_limit_s)
                    response.raise_for_status()
                except httpx.HTTPError as exc:
                    reason = _reason(exc)
                    await anyio.sleep(0.1)
                else:
                    return
        raise TimeoutError(f"{self._base_url}/health was not ready within {limit_s} s: {reason}. See the server's log.")

    async def _post(self, route: str, body: dict[str, object] | None = None) -> None:
        response = await self._client.post(self._base_url + route, json=body, timeout=self._call_limit_s)
        response.raise_for_status()

    async def _resume(self) -> None:
        try:
            await self._post("/resume")
        except httpx.HTTPError as exc:
            raise WeightUpdateError(
                f"{self._base_url} could not be resumed after a push: {_reason(exc)}. Restart it.",
                served=False,
            ) from exc


# --- the server's side ---


def served_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor a push replaces, by name: parameters and saved buffers, tied ones once under their first name."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in saved}


def read_weights(file: WeightFile, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, mapped read-only, after checking them against its own description and `expected`.

    Raises WeightsRefusedError naming what does not fit; nothing of `expected` is touched.
    """
    if sorted(file.names) != sorted(expected):
        missing, unknown = sorted(expected.keys() - file.names), sorted(set(file.names) - expected.keys())
        raise WeightsRefusedError(
            f"{file.path}: missing {missing[:3]}, unknown {unknown[:3]}. Send the served model's names."
        )
    for name, dtype_name, shape in zip(file.names, file.dtype_names, file.shapes, strict=True):
        _check(file, name, dtype_name, shape, expected[name])
    tensors = _open(file.path)
    if tensors.keys() != expected.keys():
        raise WeightsRefusedError(f"{file.path} holds {len(tensors)} tensors, its description names {len(file.names)}.")
    for name, tensor in tensors.items():
        _check(file, name, _dtype_name(tensor), list(tensor.shape), expected[name])
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
            raise WeightsRefusedError(f"{file.path}: {name} holds NaN or infinity. Roll the trainer back one step.")
    found = _checksum(tensors)
    if found != file.checksum:
        raise WeightsRefusedError(
            f"{file.path} has checksum {found}, announced was {file.checksum}: it changed since it was written. Push again."
        )
    return tensors


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name, as vLLM's weight checker reports them."""
    return {name: hashlib.sha256(_raw(tensor)).hexdigest() for name, tensor in tensors.items()}


def _open(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (OSError, SafetensorError) as exc:
        raise WeightsRefusedError(f"{path} cannot be read: {exc}. Write it again and push.") from exc


def _describe(path: Path, ordered: Mapping[str, Tensor]) -> WeightFile:
    return WeightFile(
        path=path,
        names=list(ordered),
        dtype_names=[_dtype_name(tensor) for tensor in ordered.values()],
        shapes=[list(tensor.shape) for tensor in ordered.values()],
        checksum=_checksum(ordered),
        bytes=sum(tensor.nbytes for tensor in ordered.values()),
    )


def _check(file: WeightFile, name: str, dtype_name: str, shape: list[int], expected: Tensor) -> None:
    if shape != list(expected.shape) or dtype_name != _dtype_name(expected):
        raise WeightsRefusedError(
            f"{file.path}: {name} is {dtype_name} {shape}, served is {_dtype_name(expected)} {list(expected.shape)}. "
            "Push weights of the served model."
        )


def _checksum(ordered: Mapping[str, Tensor]) -> str:
    # CRC-32 finds a torn or overwritten file, which is all that can happen between two of our own processes, at
    # twice the speed of a cryptographic hash; this runs while generation stands still.
    crc = 0
    for name, tensor in ordered.items():
        crc = zlib.crc32(f"{name} {_dtype_name(tensor)} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(_raw(tensor), crc)
    return f"crc32:{crc:08x}"


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _reason(exc: httpx.HTTPError) -> str:
    if isinstance(exc, httpx.HTTPStatusError):
        return f"{exc.request.url.path} answered {exc.response.status_code}: {exc.response.text[:300]}"
    return f"{type(exc).__name__} {exc}".strip()
