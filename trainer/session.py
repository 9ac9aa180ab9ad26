"""A training run in progress: the policy, what it has learnt from, and where its weights are.

    learn → checkpoint → publish the version on the bus → push to the engines

Always in this order, so that a version that anyone has seen can be reproduced: a trainer that dies anywhere in it
comes back with the last checkpoint, publishes it again (the same bytes, so a no-op) and pushes it again.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import msgspec
from torch import Tensor
from transformers import PreTrainedModel

from lightning_bus import (
    BrokenError,
    Client,
    RunFile,
    StorageError,
    TrainedRollout,
    WeightVersion,
    wall_ns,
)
from lightning_bus.adapters import Row
from trainer.config import PolicySection, ServeSection, TrainSection
from trainer.metrics import MetricsFile
from trainer.optimize import checkpoint
from trainer.optimize.checkpoint import Part
from trainer.optimize.following import policy_on
from trainer.optimize.optimizer import Optimizer
from trainer.policy.build import serves_adapters
from trainer.policy.lora import (
    adapter_config,
    adapter_weights,
    export_policy,
    merged_from,
    served_weights,
    write_config,
)
from trainer.policy.model import gathered_weights, has_adapter, load_policy, load_tokenizer
from trainer.ranks import World
from trainer.refusals import as_config_error, refuse_engine
from trainer.registry import files_to_keep, publish, published_as
from trainer.serving.adapters import AdapterTransfer
from trainer.serving.errors import WeightUpdateError
from trainer.serving.fleet import ENGINE_LIMIT_S, Fleet, build_transfer
from trainer.serving.remote import RemoteEngine
from trainer.serving.slots import shm_directory
from trainer.serving.weights import weights_checksum
from trainer.sinks import Sinks

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Progress:
    """What a checkpoint keeps beside weights and optimiser. Plain values, so msgpack can say it."""

    phase: str = "init"  # init → sft → rl → done
    version: int = 0
    parent: int | None = None
    step: int = 0  # of the phase
    submitted_groups: int = 0
    consumed_groups: int = 0  # trained on, or replaced because they taught nothing
    stream: dict[str, Any] = field(default_factory=lambda: {"offset": 0, "consumed": {}})
    evals: dict[str, float] = field(default_factory=dict[str, float])  # version → held-out success
    rewards: list[float] = field(default_factory=list[float])  # mean reward of each step
    trained: list[Any] = field(default_factory=list[Any])  # what this version learnt from
    line: dict[str, Any] = field(default_factory=dict[str, Any])  # its line in metrics.jsonl
    started_ns: int = 0
    checkpoints: int = 0  # saved so far; the newest has the highest number
    curriculum: dict[str, list[float]] = field(default_factory=dict[str, list[float]])  # data.curriculum.Rates
    rolled_back: int = 0  # the version that a rollback made: what versions before it sampled is not trained on


class Session:
    """Everything the algorithms share."""

    def __init__(
        self,
        run: RunFile,
        bus: Client,
        http: httpx.AsyncClient,
        engine_urls: Sequence[str],
        world: World = World(),  # noqa: B008 - frozen: this process alone, on the CPU
    ) -> None:
        self.run = run
        self.train = run.section(TrainSection)
        self.policy = run.section(PolicySection)
        self.published_as = published_as(run)
        self.bus = bus
        self.directory = run.directory
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = MetricsFile(self.directory / "metrics.jsonl")
        self.sinks = Sinks(run, _name_of(self.directory))
        self.progress = Progress(started_ns=_started_ns(run.directory))
        self.model: PreTrainedModel = policy_on(world, self.policy, self.directory / "policy")
        serve = run.section(ServeSection)
        self.adapters_served = serves_adapters(serve, self.policy.lora_rank)
        if self.adapters_served:
            transfer = AdapterTransfer(self.directory / "adapters", self.policy.name, adapter_config(self.model))
        else:
            # Files are named after the run's directory, so that a resumed trainer takes them over.
            name = f"lightning-bus-{_name_of(self.directory)}"
            transfer = build_transfer(serve, self.directory, name, limit_s=self.train.push_limit_s)
        self.engines = [RemoteEngine(http, url, limit_s=self.train.push_limit_s) for url in engine_urls]
        # Not shorter than an engine that is started again may take.
        restart_limit_s = serve.start_limit_s if serve.engine == "vllm" else ENGINE_LIMIT_S
        self.fleet = Fleet(
            self.engines,
            transfer,
            mode=self.train.push_mode,
            limit_s=self.train.push_limit_s + restart_limit_s,
        )

    def resume(self) -> None:
        """Take over weights and progress from the newest checkpoint, if there is one; see `restore_optimizer` too.

        Raises ConfigError for a checkpoint of another model.
        """
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            return
        with as_config_error(f"{self.directory} cannot go on from its checkpoint"):
            found = checkpoint.load(path, self.model, None)
        self.progress = msgspec.convert(found.extra, Progress)
        log.info(
            "resumed from %s: phase %s, step %s, version %s",
            path.name,
            self.progress.phase,
            self.progress.step,
            self.progress.version,
        )

    def restore_optimizer(self, optimizer: Optimizer, parts: Mapping[str, Part] | None = None) -> None:
        """Give an optimiser, and parts beside the policy, their state back, if the newest checkpoint is of their phase.

        Raises ConfigError when it was made without such parts: by a run with another algorithm.
        """
        path = checkpoint.latest(self.checkpoints)
        if path is None or self.progress.step == 0:
            return
        with as_config_error("this run cannot go on with what is configured now"):
            checkpoint.load(path, self.model, optimizer, parts=parts)

    def checkpoint(self, optimizer: Optimizer, parts: Mapping[str, Part] | None = None) -> None:
        """Make model, optimiser, parts beside the policy and progress durable."""
        self.progress.checkpoints += 1
        extra = msgspec.to_builtins(self.progress)
        with storing(self.checkpoints):
            if has_adapter(self.model):
                write_config(self.checkpoints, adapter_config(self.model))
            checkpoint.save(self.checkpoints, self.progress.checkpoints, self.model, optimizer, extra, parts=parts)

    async def retain(self) -> None:
        """Drop old checkpoints: all but the newest few, and those of pinned versions and of the one that is served."""
        spared = await files_to_keep(self.bus, self.directory, self.published_as)
        with storing(self.checkpoints):
            checkpoint.drop_old(self.checkpoints, self.train.keep_checkpoints, spared)

    async def record(self) -> None:
        """Say on the bus that the checkpointed weights are the current version."""
        progress = self.progress
        # Version 0 is the directory that the run began with; an adapter has added nothing to it yet.
        first = not progress.version and has_adapter(self.model)
        weights = gathered_weights(load_policy(self._file) if first else self.model)
        version = WeightVersion(
            version=progress.version,
            parent=progress.parent,
            phase=progress.phase,
            step=progress.step,
            checksum=await anyio.to_thread.run_sync(weights_checksum, weights),
            trained=msgspec.convert(progress.trained, list[TrainedRollout], strict=False),
            metrics={key: float(value) for key, value in progress.line.items() if isinstance(value, (int, float))},
            path=str(self._file.absolute()),
            created_ns=wall_ns(),
        )
        await publish(self.bus, version, self.published_as)

    async def refuse_other_tokens(self) -> None:
        """Raise ConfigError when an engine of this run does not have the policy's tokenizer."""
        tokenizer = load_tokenizer(self.directory / "policy")
        for engine in self.engines:
            await refuse_engine(engine, self.policy.name, tokenizer)

    async def publish(self) -> None:
        """Make the checkpointed weights the ones that engines serve, under their version, and say so on the bus."""
        progress = self.progress
        frozen = {name for name, tensor in self.model.named_parameters() if not tensor.requires_grad}
        place = self.run.section(ServeSection).transfer_directory or shm_directory()
        # Before the record, so that weights that cannot be served are never announced.
        try:
            with storing(Path(place)):
                await self.fleet.prepare(self._served_weights(), str(progress.version), frozen=frozen)
        except WeightUpdateError as exc:
            raise BrokenError(f"weight version {progress.version} cannot be served: {exc}") from exc
        await self.record()
        try:
            times = await self.fleet.push()
        except WeightUpdateError as exc:
            raise BrokenError(f"weight version {progress.version} was not pushed: {exc}") from exc
        if progress.line:
            progress.line.update(
                push_s=times.seconds,
                push_copy_s=times.copy_s,
                standstill_ms=times.standstill_ms,
                replicas_current=times.current,
            )

    def tell(self, line: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, and where else [train] log wants it."""
        with storing(self.metrics.path):
            fresh = self.metrics.write(line)
        if fresh:
            self.sinks.write(line)

    def note(self, phase: str, **values: Any) -> dict[str, Any]:
        """Return a line for metrics.jsonl."""
        seconds = (wall_ns() - self.progress.started_ns) / 1e9
        return {
            "phase": phase,
            "step": self.progress.step,
            "version": self.progress.version,
            "wall_s": seconds,
            **values,
        }

    def export(self) -> Path:
        """Write the policy as a directory that `lightning-bus serve` and any Hugging Face loader take."""
        target = self.directory / "checkpoint"
        with storing(target):
            export_policy(self.model, load_tokenizer(self.directory / "policy"), target)
        return target

    def close(self) -> None:
        """Let go of the weight files, and of the sinks. An engine that restarts reads the checkpoint."""
        self.fleet.close()
        self.sinks.close()

    def _served_weights(self) -> dict[str, Tensor]:
        """What engines are pushed: the adapter where they take it, else the whole model with the adapter in it."""
        if self.adapters_served:
            return adapter_weights(self.model)
        if has_adapter(self.model) and self.policy.compute_dtype != "float32":
            # The live base is rounded; the one that a restarted replica puts together from the checkpoint is not.
            return merged_from(gathered_weights(self.model), adapter_config(self.model), self.directory / "policy")
        return served_weights(self.model)

    @property
    def _file(self) -> Path:
        """The file of the current version: the checkpoint just written, or for version 0 the first policy."""
        progress = self.progress
        return (
            checkpoint.path_of(self.checkpoints, progress.checkpoints)
            if progress.version
            else self.directory / "policy"
        )


@contextmanager
def storing(place: Path) -> Iterator[None]:
    """Translate a disk that refuses data. Everything that was checkpointed before is safe, so the run can go on later."""
    try:
        yield
    except OSError as exc:
        raise StorageError(f"cannot write {place}: {exc}. Free space there; the run goes on where it was.") from exc


def trained_record(rows: Sequence[Row]) -> list[tuple[str, int, list[bytes]]]:
    """Return which recorded calls these rows hold, one entry a rollout attempt, for the version's record."""
    spans: dict[tuple[str, int], list[bytes]] = {}
    for row in rows:
        spans.setdefault((row.rollout_id, row.attempt), []).extend(row.span_ids)
    return [(rollout_id, attempt, ids) for (rollout_id, attempt), ids in sorted(spans.items())]


def _started_ns(run_directory: Path) -> int:
    """When the run began: `up` makes its secret before it starts anything, and never touches it again."""
    secret = run_directory / "secret"
    return secret.stat().st_mtime_ns if secret.exists() else wall_ns()


def _name_of(directory: Path) -> str:
    """A name that no other run on this machine has: two checkouts may both have a runs/calc."""
    path = directory.resolve()
    return f"{path.name}-{zlib.crc32(str(path).encode()):08x}"
