"""Weights from the trainer's GPU to the engines' GPUs, by vLLM's own `nccl` backend: a packed broadcast.

    rank 0                 the trainer
    ranks 1 … w            workers of the first replica (data parallel index × tensor·pipeline size + rank)
    ranks w+1 …            workers of the next

    init_weight_transfer_engine(unique id, rank offset, world size) ‖ the trainer joins      once for a set of replicas
    update_weights(names, dtypes, shapes) ‖ the trainer broadcasts chunk after chunk         each version

What always holds: a chunk is the tensors up to and including the one that takes it past the buffer's size, on both
sides, or they would wait for each other for good; each wait has a limit, after which the group is aborted; a failure
after the start leaves replicas unfit, because vLLM overwrites as the chunks come. NCCL is called through the library
that torch brings; vllm is not imported, and no store is needed, since the unique id travels in the HTTP call.

Covered by tests here: every HTTP field and the order of calls, against a stand-in of vLLM's surface; the chunks, against
vLLM's own consumer on a CPU. A run over real NCCL needs a GPU on each side.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from trainer.serving.errors import EngineSilentError, WeightsRefusedError, WeightUpdateError
from trainer.serving.push import Call, Target, all_of
from trainer.serving.remote import CALL_LIMIT_S, RemoteEngine
from trainer.serving.weights import dtype_name

BUFFER_BYTES = 1 << 30  # vLLM's own default, and what it needs in memory twice
BUFFERS = 2
UNIQUE_ID_BYTES = 128


class Group(Protocol):
    """Rank 0 of a group of GPUs."""

    def broadcast(self, chunk: Tensor) -> None:
        """Send the chunk to all others; it must not change until `wait`."""
        ...

    def wait(self) -> None:
        """Return once everything has been sent."""
        ...

    def abort(self) -> None:
        """End all waiting, here and at the others; the group is of no use any more. May be called from any thread."""
        ...


class NcclTransfer:
    """By broadcast from this process, which must see a GPU of its own.

    new_id  mints the id of a group
    join    (id, world size) → rank 0 of the group; returns when all ranks have joined
    """

    together = True

    def __init__(
        self,
        *,
        dtype: torch.dtype | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        limit_s: float = CALL_LIMIT_S,
        new_id: Callable[[], bytes] | None = None,
        join: Callable[[bytes, int], Group] | None = None,
    ) -> None:
        self.dtype = dtype
        self.buffer_bytes = buffer_bytes
        self.limit_s = limit_s
        self._new_id = new_id or nccl_unique_id
        self._join = join or NcclGroup
        self._group: Group | None = None
        self._device = torch.device("cpu")  # where the last offer's weights lie
        self.members: list[str] = []  # URLs of the replicas in the group

    def offer(self, tensors: Mapping[str, Tensor], version: str, *, frozen: Collection[str] = ()) -> NcclOffer:
        """Copy and cast the weights where they are; a replica may be caught up while the next step is computed."""
        copies: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            wire = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            copies[name] = copy = tensor.detach().to(wire, copy=True).contiguous()
            if copy.is_floating_point():
                sums[name] = copy.sum(dtype=torch.float32)
        # The device is asked once, behind all of the copies.
        finite = torch.stack(list(sums.values())).isfinite().tolist() if sums else []
        for name, is_finite in zip(sums, finite, strict=True):
            if not is_finite:
                wire_name = dtype_name(copies[name].dtype)
                raise WeightsRefusedError(f"{name} holds NaN or infinity as {wire_name}. Roll back one step.")
        self._device = next((copy.device for copy in copies.values()), self._device)
        # Wide elements first: vLLM's consumer views each tensor where it lies in its chunk, at a multiple of its width.
        return NcclOffer(self, dict(sorted(copies.items(), key=lambda item: -item[1].itemsize)), version)

    async def connect(self, engines: Sequence[RemoteEngine]) -> None:
        """Make one group of this process and all workers of these engines, unless that is what there is."""
        members = [engine.url for engine in engines]
        if self._group is not None and members == self.members:
            return
        self.close()
        sizes = [await engine.world_size() for engine in engines]
        unique_id, world_size = self._new_id(), 1 + sum(sizes)
        joining = _Thread(lambda: self._join(unique_id, world_size), self._device)
        calls: dict[str, Call] = {}
        rank_offset = 1
        for engine, size in zip(engines, sizes, strict=True):
            calls[engine.url] = _init(engine, self._init_info(unique_id, rank_offset, world_size))
            rank_offset += size
        failures = await all_of(calls)
        if failures:
            raise next(iter(failures.values()))
        self._group = await joining.result(self.limit_s, "joining the engines' NCCL group")
        self.members = members

    async def broadcast(self, tensors: Iterable[Tensor]) -> None:
        group = self._group
        assert group is not None, "connect() comes first"

        def send() -> None:
            for chunk in packed(tensors, self.buffer_bytes):
                group.broadcast(chunk)
            group.wait()

        try:
            await _Thread(send, self._device).result(self.limit_s, "broadcasting weights")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        group, self._group, self.members = self._group, None, []
        if group is not None:
            group.abort()

    def _init_info(self, unique_id: bytes, rank_offset: int, world_size: int) -> dict[str, Any]:
        return {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
            "rank_offset": rank_offset,
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": self.buffer_bytes,
            "packed_num_buffers": BUFFERS,
        }


@dataclass(slots=True)
class NcclOffer:
    """One version's weights on the trainer's GPU."""

    transfer: NcclTransfer
    tensors: Mapping[str, Tensor]
    version: str
    staged: bool = False

    async def connect(self, engines: Sequence[RemoteEngine]) -> None:
        await self.transfer.connect(engines)

    def update_info(self, target: Target) -> dict[str, Any]:
        return {
            "names": list(self.tensors),
            "dtype_names": [dtype_name(tensor.dtype) for tensor in self.tensors.values()],
            "shapes": [list(tensor.shape) for tensor in self.tensors.values()],
        }

    async def carry(self, updates: Mapping[str, Call]) -> dict[str, WeightUpdateError]:
        """Broadcast while the engines receive. One that fails takes the others with it: they share each chunk."""
        failures: dict[str, WeightUpdateError] = {}
        if len(updates) < len(self.transfer.members):
            # One of the group is out already, and a broadcast would wait for it until the limit.
            self.transfer.close()
            missing = WeightUpdateError("another replica of the same NCCL group failed before the broadcast.")
            return dict.fromkeys(updates, missing)
        async with anyio.create_task_group() as tasks:

            async def send() -> None:
                try:
                    await self.transfer.broadcast(self.tensors.values())
                except WeightUpdateError as exc:
                    failures.update({url: exc for url in updates if url not in failures})

            async def receive() -> None:
                found = await all_of(updates, on_failure=self.transfer.close)
                failures.update(found)

            tasks.start_soon(receive)
            tasks.start_soon(send)
        return failures

    def arrived(self, engine: RemoteEngine) -> None:
        pass  # the engine's memory is its own


def packed(tensors: Iterable[Tensor], buffer_bytes: int) -> Iterator[Tensor]:
    """Yield uint8 chunks: the bytes of as many tensors as it takes to pass `buffer_bytes`, one after the other."""
    chunk: list[Tensor] = []
    size = 0
    for tensor in tensors:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        chunk.append(flat)
        size += flat.numel()
        if size > buffer_bytes:
            yield torch.cat(chunk)
            chunk, size = [], 0
    if chunk:
        yield torch.cat(chunk)


# --- NCCL itself, from the library that torch has loaded ---


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


UINT8, FLOAT32, SUM = 1, 7, 0  # ncclDataType_t, ncclRedOp_t


def nccl_unique_id() -> bytes:
    """A new group's id. Raises WeightUpdateError where there is no NCCL."""
    unique_id = _UniqueId()
    _check(_library(), _library().ncclGetUniqueId(ctypes.byref(unique_id)))
    return bytes(unique_id.internal)


class NcclGroup:
    """Rank 0 of an NCCL communicator over the current CUDA device."""

    def __init__(self, unique_id: bytes, world_size: int) -> None:
        self._nccl = _library()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._comm = ctypes.c_void_p()
        self._in_flight: list[Tensor] = []
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)
            identity = _UniqueId.from_buffer_copy(unique_id)
            _check(self._nccl, self._nccl.ncclCommInitRank(ctypes.byref(self._comm), world_size, identity, 0))
            # vLLM's workers sum one number right after they have joined, and wait for everybody to do so.
            one = torch.zeros(1, device=self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            _check(
                self._nccl,
                self._nccl.ncclAllReduce(
                    *(ctypes.c_void_p(one.data_ptr()),) * 2, ctypes.c_size_t(1), FLOAT32, SUM, self._comm, self._queue
                ),
            )
            self._stream.synchronize()

    def broadcast(self, chunk: Tensor) -> None:
        with torch.cuda.device(self._device):
            chunk = chunk.to(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            pointer = ctypes.c_void_p(chunk.data_ptr())
            _check(
                self._nccl,
                self._nccl.ncclBroadcast(
                    pointer, pointer, ctypes.c_size_t(chunk.numel()), UINT8, 0, self._comm, self._queue
                ),
            )
            self._in_flight.append(chunk)
            if len(self._in_flight) >= BUFFERS:
                self.wait()

    def wait(self) -> None:
        self._stream.synchronize()
        self._in_flight.clear()

    def abort(self) -> None:
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._nccl.ncclCommAbort(comm)

    @property
    def _queue(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._stream.cuda_stream)


def _library() -> Any:
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as exc:
        raise WeightUpdateError(
            f'[serve] transfer = "nccl" needs torch for CUDA, which brings NCCL: {exc}. Use "shm" or "file" on a CPU.'
        ) from exc
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int]
    return library


def _check(library: Any, result: int) -> None:
    if result:
        raise EngineSilentError(f"NCCL: {library.ncclGetErrorString(result).decode()}")


def _init(engine: RemoteEngine, init_info: dict[str, Any]) -> Call:
    async def call() -> None:
        await engine.init_transfer(init_info)

    return call


class _Thread:
    """A call that may hang for good, on a thread that nobody has to join when the process ends.

    A new thread's current device is the first GPU, whichever the trainer has taken: it is told the weights' own.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self._done = threading.Event()
        self._outcome: list[Any] = []
        self._failure: BaseException | None = None

        def run() -> None:
            try:
                with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                    self._outcome.append(function())
            except BaseException as exc:
                self._failure = exc
            self._done.set()

        threading.Thread(target=run, name="nccl", daemon=True).start()

    async def result(self, limit_s: float, what: str) -> Any:
        """What the call returned. Raises EngineSilentError after limit_s, or what the call raised."""
        if not await anyio.to_thread.run_sync(self._done.wait, limit_s):
            raise EngineSilentError(f"{what} took longer than {limit_s:g} s: one of the replicas is gone or hangs")
        if self._failure is not None:
            if isinstance(self._failure, WeightUpdateError):
                raise self._failure
            raise EngineSilentError(f"{what} failed: {self._failure}") from self._failure
        return self._outcome[0]
