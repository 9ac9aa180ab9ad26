"""A training run in progress: the policy, what it has learnt from, and where its weights are.

    learn → checkpoint → publish the version on the bus → push to the engines

Always in this order, so that a version that anyone has seen can be reproduced: a trainer that dies anywhere in it
comes back with the last checkpoint, publishes it again (the same bytes, so a no-op) and pushes it again.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import msgspec
from transformers import PreTrainedModel

from lightning_bus import (
    POLICY_WEIGHTS,
    BrokenError,
    Client,
    Resource,
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
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import StepMetrics
from trainer.policy.model import gathered_weights, load_policy, load_tokenizer, save_policy
from trainer.registry import files_to_keep
from trainer.serving.errors import WeightUpdateError
from trainer.serving.fleet import ENGINE_LIMIT_S, Fleet, build_transfer
from trainer.serving.remote import RemoteEngine
from trainer.serving.slots import shm_directory
from trainer.serving.weights import weights_checksum

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

    def __init__(self, run: RunFile, bus: Client, http: httpx.AsyncClient, engine_urls: Sequence[str]) -> None:
        self.run = run
        self.train = run.section(TrainSection)
        self.policy = run.section(PolicySection)
        self.bus = bus
        self.directory = run.directory
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = MetricsFile(self.directory / "metrics.jsonl")
        self.progress = Progress(started_ns=_started_ns(run.directory))
        self.model: PreTrainedModel = load_policy(self.directory / "policy")
        # Files are named after the run's directory, so that a resumed trainer takes them over.
        transfer = build_transfer(
            run.section(ServeSection),
            self.directory,
            f"lightning-bus-{_name_of(self.directory)}",
            limit_s=self.train.push_limit_s,
        )
        self.fleet = Fleet(
            [RemoteEngine(http, url, limit_s=self.train.push_limit_s) for url in engine_urls],
            transfer,
            mode=self.train.push_mode,
            limit_s=self.train.push_limit_s + ENGINE_LIMIT_S,
        )

    def resume(self) -> None:
        """Take over weights and progress from the newest checkpoint, if there is one; see `restore_optimizer` too."""
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            return
        optimizer = Optimizer(self.model, lr=1.0)
        found = checkpoint.load(path, self.model, optimizer)
        self.progress = msgspec.convert(found.extra, Progress)
        log.info(
            "resumed from %s: phase %s, step %s, version %s",
            path.name,
            self.progress.phase,
            self.progress.step,
            self.progress.version,
        )

    def restore_optimizer(self, optimizer: Optimizer) -> None:
        """Give an optimiser its state back, if the newest checkpoint was made in the middle of its phase."""
        path = checkpoint.latest(self.checkpoints)
        if path is not None and self.progress.step > 0:
            checkpoint.load(path, self.model, optimizer)

    def checkpoint(self, optimizer: Optimizer) -> None:
        """Make model, optimiser and progress durable."""
        self.progress.checkpoints += 1
        extra = msgspec.to_builtins(self.progress)
        with storing(self.checkpoints):
            checkpoint.save(self.checkpoints, self.progress.checkpoints, self.model, optimizer, extra)

    async def retain(self) -> None:
        """Drop old checkpoints: all but the newest few, and those of pinned versions and of the one that is served."""
        spared = await files_to_keep(self.bus, self.directory)
        with storing(self.checkpoints):
            checkpoint.drop_old(self.checkpoints, self.train.keep_checkpoints, spared)

    async def record(self) -> None:
        """Say on the bus that the checkpointed weights are the current version."""
        progress = self.progress
        weights = gathered_weights(self.model)
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
        known = await self.bus.get(POLICY_WEIGHTS, progress.version)
        if known is None:
            await self.bus.put(Resource(POLICY_WEIGHTS, progress.version, msgspec.msgpack.encode(version)))

    async def publish(self) -> None:
        """Make the checkpointed weights the ones that engines serve, under their version, and say so on the bus."""
        progress = self.progress
        frozen = {name for name, tensor in self.model.named_parameters() if not tensor.requires_grad}
        place = self.run.section(ServeSection).transfer_directory or shm_directory()
        # Before the record, so that weights that cannot be served are never announced.
        try:
            with storing(Path(place)):
                await self.fleet.prepare(gathered_weights(self.model), str(progress.version), frozen=frozen)
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
        """Write a line to metrics.jsonl."""
        with storing(self.metrics.path):
            self.metrics.write(line)

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
            save_policy(self.model, load_tokenizer(self.directory / "policy"), target)
        return target

    def close(self) -> None:
        """Let go of the weight files. An engine that restarts reads the checkpoint."""
        self.fleet.close()

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


def step_line(metrics: StepMetrics) -> dict[str, float]:
    """Return the part of a metrics line that every optimiser step has."""
    return {
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "lr": metrics.lr,
        "trained_tokens": metrics.trained_tokens,
        "tokens_per_s": metrics.tokens_per_s,
        "step_s": metrics.forward_s + metrics.backward_s + metrics.update_s,
        **metrics.means,
    }


def _started_ns(run_directory: Path) -> int:
    """When the run began: `up` makes its secret before it starts anything, and never touches it again."""
    secret = run_directory / "secret"
    return secret.stat().st_mtime_ns if secret.exists() else wall_ns()


def _name_of(directory: Path) -> str:
    """A name that no other run on this machine has: two checkouts may both have a runs/calc."""
    path = directory.resolve()
    return f"{path.name}-{zlib.crc32(str(path).encode()):08x}"
