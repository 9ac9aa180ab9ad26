"""Which weights a replica has to hold before it may answer, and how a fresh one gets them.

    Weights.load_into(model)     the embedded engine: before it exists
    Weights.bring(engine, …)     vLLM: through its control routes, before it is labelled

What always holds: a replica is given a number as its label only with that version's weights in it; where the newest
cannot be read, it is called "behind", which nobody calls and the trainer pushes to. While they are on
their way a newer version may be published, so the registry is asked again before the label is set; what is published
after that the trainer pushes, because from the label on the replica is the trainer's. The weights are read from where
the version's record says they stay, never from what the trainer pushed last: that may be gone with the trainer.
"""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_bus import POLICY, Client, NotFound, WeightVersion
from trainer import registry
from trainer.config import ServeSection
from trainer.policy.lora import ALL_LINEAR, write_adapter, zero_adapter
from trainer.serving.errors import WeightsRefusedError, WeightUpdateError
from trainer.serving.remote import BEHIND, RemoteEngine
from trainer.serving.slots import shm_directory, write_weights
from trainer.serving.weights import served_tensors

UNLABELLED = "default"  # what vLLM calls its weights by itself
FIRST = "0"  # the label of the weights that a run, or a plain model directory, begins with
UNREADABLE = (NotFound, ValueError, OSError)  # what a version whose file is gone, damaged or elsewhere raises

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """The name of the model that answers with an adapter, and the shape of the first one, which adds nothing."""

    name: str
    rank: int
    alpha: float | None = None
    targets: Sequence[str] = ()

    def first(self, base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return zero_adapter(base, self.rank, alpha=self.alpha, targets=self.targets or ALL_LINEAR)


@dataclass(frozen=True, slots=True)
class Weights:
    """The versions of one run, as far as they are to be served.

    bus_address    of the run's broker
    run_directory  where its files are
    pinned         the version that is served for good; None: the newest
    bus_limit_s    for each question to the broker, which may be restarting
    policy         whose versions, as `registry.published_as` names it
    adapter        what a version's adapter is served as, where replicas take adapters; None: whole models
    """

    bus_address: str | None
    run_directory: Path
    pinned: int | None = None
    bus_limit_s: float = 30.0
    policy: str = POLICY
    adapter: ServedAdapter | None = None

    async def wanted(self) -> WeightVersion | None:
        """Return the version to be served now; None before the first.

        Raises NotFound for a pinned one that was never published, BrokenError when the broker does not answer.
        """
        if self.bus_address is None:
            known = await anyio.to_thread.run_sync(registry.read_log, self.run_directory, self.policy)
            return known.newest if self.pinned is None else known.get(self.pinned)
        async with Client(self.bus_address, role="serve", limit_s=self.bus_limit_s) as bus:
            if self.pinned is None:
                return await registry.newest(bus, self.policy)
            return await registry.get(bus, self.pinned, self.policy)

    async def load_into(self, model: PreTrainedModel) -> str:
        """Overwrite the model's weights with the wanted ones and return their label; "0" where there are none yet.

        "behind", and a line in the log, for a newest version that cannot be read here: the trainer will push.
        """
        held: str = FIRST
        while (version := await self.wanted()) is not None and str(version.version) != held:
            tensors = await self._read(version, registry.tensors_of)
            if tensors is None:
                return BEHIND
            await anyio.to_thread.run_sync(_overwrite, model, tensors, version)
            held = str(version.version)
        return held

    async def bring(self, engine: RemoteEngine, section: ServeSection) -> str:
        """Give a fresh replica, which holds the first weights, the wanted ones; label it, and return the label.

        Raises WeightUpdateError, BrokenError and others that say what is in the way; `served` of the first says
        whether the replica took harm.
        """
        held: str = FIRST
        place = await anyio.to_thread.run_sync(_emptied, self.run_directory, engine)
        if self.adapter is not None:  # version 0 has a name to answer to, too
            first = await anyio.to_thread.run_sync(self.adapter.first, self.run_directory / "policy")
            await _give_adapter(engine, self.adapter.name, place / FIRST, *first)
        while (version := await self.wanted()) is not None and str(version.version) != held:
            if self.adapter is not None:
                given = await self._read(version, registry.adapter_of)
                if given is not None:
                    await _give_adapter(engine, self.adapter.name, place / str(version.version), *given)
            else:
                given = await self._read(version, registry.tensors_of)
                if given is not None:
                    await _push(engine, section, given, str(version.version))
            if given is None:
                held = BEHIND
                break
            held = str(version.version)
        await engine.set_label(held)
        return held

    async def _read(self, version: WeightVersion, read: Callable[[WeightVersion, Path], T]) -> T | None:
        """The weights of a version; None when they cannot be read here and the trainer has to bring them."""
        try:
            return await anyio.to_thread.run_sync(read, version, self.run_directory)
        except UNREADABLE as exc:
            if self.pinned is not None:
                raise
            newer = await self.wanted()
            if newer is not None and newer.version != version.version:
                return await self._read(newer, read)  # its file was dropped while we looked
            log.warning("version %s cannot be read here, so the trainer has to push it: %s", version.version, exc)
            return None


def _emptied(run_directory: Path, engine: RemoteEngine) -> Path:
    """Where this replica's adapters lie, without those of the replica before it."""
    place = run_directory.absolute() / "replicas" / f"{socket.gethostname()}-{engine.url.rpartition(':')[2]}"
    shutil.rmtree(place, ignore_errors=True)
    return place


async def _give_adapter(
    engine: RemoteEngine, name: str, place: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    """Have a replica that nobody calls yet answer with this adapter.

    place  a directory that stays as long as the replica does: vLLM 0.32 reads an adapter that came in the place of another
           again at each step, and its engine dies where the files are gone
    """
    await anyio.to_thread.run_sync(write_adapter, place, config, tensors)
    await engine.load_adapter(name, str(place))


async def _push(engine: RemoteEngine, section: ServeSection, tensors: Mapping[str, Tensor], version: str) -> None:
    """Put these weights into a replica that nobody calls yet; it may keep its own label."""
    dtype: torch.dtype = getattr(torch, section.dtype)
    name = f"lightning-bus-start-{engine.url.rpartition(':')[2]}-"
    with tempfile.TemporaryDirectory(prefix=name, dir=shm_directory()) as directory:
        path = Path(directory) / "model.safetensors"

        def write() -> dict[str, object]:
            return write_weights(tensors, path, version, dtype=dtype).with_checksum().update_info()

        update_info = await anyio.to_thread.run_sync(write)
        try:
            if section.transfer == "nccl":
                # That way needs the trainer at its other end, but vLLM can read a directory anew by itself.
                await engine.reload(directory)
                return
            await engine.start()
            await engine.update(update_info)
            await engine.finish(UNLABELLED)
        except WeightUpdateError as exc:
            # Perhaps it was refused and nothing is lost; but then it would be refused again, and a start mends both.
            raise WeightUpdateError(str(exc), served=False) from exc


def _overwrite(model: PreTrainedModel, tensors: Mapping[str, Tensor], version: WeightVersion) -> None:
    held = served_tensors(model)
    if {name: tensor.shape for name, tensor in held.items()} != {name: t.shape for name, t in tensors.items()}:
        odd = sorted(name for name in held.keys() | tensors.keys() if _shape(held, name) != _shape(tensors, name))
        raise WeightsRefusedError(
            f"version {version.version} ({version.path}) is not of this model: {', '.join(odd[:3])} differ. Serve the "
            "run's own policy."
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(tensors[name])


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
