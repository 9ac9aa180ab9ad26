"""The processes that train one policy together, and how one of them leads.

    [train] processes = 4                                              in RUN.toml: the first process starts the others
    torchrun --nproc-per-node 4 -m lightning_bus.cli train RUN.toml    the same, and over several machines

Rank 0 leads: it alone talks to the bus and to engines, and its loop is the one of a single process. What ranks must do
together (a step, a checkpoint, putting weights together) tells the others by itself, see `lead`; they do nothing but
wait for such orders (`optimize.following.follow`). So every rank makes the same collective calls in the same order.

Messages are MessagePack: torch's own collectives for objects pickle.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] - where torch documents them

from lightning_bus import ConfigError

# Where a process that its trainer started meets it: host:port of the store that torchrun would have.
MEETING = "LIGHTNING_BUS_MEETING"
MEETING_LIMIT = timedelta(minutes=30)  # as torchrun's; one that has died is noticed earlier

POLICY = "policy"  # the name of the model that is trained, among those that ranks keep together

# A rank waits for the leader's next order for as long as rollouts take. One that dies is noticed at once: its
# connections close, and who started the ranks ends the others.
ORDER_LIMIT = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together, and this one's place among them.

    orders  the group of processes over which the leader tells the others what to do; None when there is one
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    orders: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0


def join(device: str = "auto", store: Store | None = None, size: int = 1) -> World:
    """Join the processes that were started to train together, and return this one's place; alone where none were.

    device  "cpu", "cuda", or "auto": a GPU for each rank of this machine where there is one
    store   where the others meet this process, which started them (`launch.other_ranks`), as the first of `size`. None:
            torchrun, or the first process, started this one

    Returns once all are there. Raises ConfigError for a rank without a GPU of its own.
    """
    rank, size = (0, size) if store else (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    local = 0 if store else int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {rank} is number {local} on this machine, which has {torch.cuda.device_count()} GPUs: start as many "
            "processes as there are GPUs, or train on CPUs (train.device)"
        )
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if size == 1:
        return World(device=place)
    if store is None and MEETING in os.environ:
        host, _, port = os.environ[MEETING].rpartition(":")
        store = TCPStore(host, int(port), size, timeout=MEETING_LIMIT)
    given = {} if store is None else {"store": store, "rank": rank, "world_size": size}  # else torchrun's environment
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, device_id=place if on_gpu else None, **given)
    orders = dist.new_group(backend="gloo", timeout=ORDER_LIMIT)
    assert isinstance(orders, dist.ProcessGroup)
    return World(rank, size, place, orders)


def leave() -> None:
    """Part from the other ranks; all of them call it, once they are done."""
    if dist.is_initialized():
        dist.barrier()  # one that goes while another still receives makes gloo abort that process
        dist.destroy_process_group()


def num_ranks() -> int:
    """How many ranks compute this step."""
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone(said: Any) -> list[Any]:
    """Return what every rank said, in the order of ranks; all ranks must call it. Anything that msgpack can say."""
    if num_ranks() == 1:
        return [said]
    mine = _bytes_tensor(msgspec.msgpack.encode(said))
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks())]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    longest = max(int(length) for length in lengths)
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
    return [
        msgspec.msgpack.decode(part[: int(length)].numpy().tobytes())
        for part, length in zip(parts, lengths, strict=True)
    ]


# --- the leader and the others ---


def led(model: torch.nn.Module) -> World | None:
    """The world that this process leads with the model; None where it is alone, or one of those that follow."""
    return getattr(model, "_led", (None, ""))[0]


def take_the_lead(model: torch.nn.Module, world: World, name: str = POLICY) -> None:
    """From now on, what is done with this model by functions that `lead` is done by all ranks.

    name  of the model, by which the others know theirs
    """
    if world.size > 1 and world.leads:
        setattr(model, "_led", (world, name))  # noqa: B010 - a module's attributes are typed as its parts


def lead(model: torch.nn.Module, what: str, **given: Any) -> None:
    """Tell the other ranks to do `what`, if this process leads any. To be called first by whatever ranks do together."""
    world, name = getattr(model, "_led", (None, ""))
    if world is not None:
        tell(world, [what, name, given])


def tell(world: World, order: Any) -> None:
    """Say something to all other ranks, which are listening by `heard`. Anything that msgpack can say."""
    said = _bytes_tensor(msgspec.msgpack.encode(order))
    dist.broadcast(torch.tensor([len(said)]), src=0, group=world.orders)
    dist.broadcast(said, src=0, group=world.orders)


def heard(world: World) -> Any:
    """Return what the leader says next, however long it takes."""
    length = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(length, src=0, group=world.orders)
    said = torch.zeros(int(length), dtype=torch.uint8)
    dist.broadcast(said, src=0, group=world.orders)
    return msgspec.msgpack.decode(said.numpy().tobytes())


def _bytes_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
