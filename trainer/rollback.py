"""Going back to an earlier weight version, and taking one away as a model directory.

    versions   … 5 ── 6 ── 7 ── 8          8 is the newest; 6 was the last good one
                      └──────────── 9      `roll_back(directory, registry, 6)`: the weights of 6, as version 9

Nothing is undone: a version that anyone has seen stays in the log, and versions only rise. What goes back is the state
of training (weights, optimiser, step, rewards); what goes on is everything that counts work done, so that no rollout is
trained on twice and no id is used again. It is one checkpoint, written whole, so it happens or it does not; whoever
trains next publishes it like any other.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import torch

from lightning_bus import BrokenError, CallError, Client, Conflict, RunFile, WeightVersion
from trainer.optimize import checkpoint
from trainer.policy.lora import write_adapter
from trainer.policy.model import load_policy, load_tokenizer, named_weights, save_policy
from trainer.registry import Registry, adapter_of, check_is, file_of, with_base
from trainer.session import Progress, Session, storing


@contextmanager
def untrained(run: RunFile) -> Generator[None]:
    """Keep trainers out while the context lasts. Raises Conflict while one runs."""
    with ExitStack() as stack:
        try:
            stack.enter_context(checkpoint.writing(run.directory / "checkpoints"))
        except BlockingIOError as exc:
            raise Conflict(
                f"{run.directory} is being trained. Stop the trainer first (Ctrl-C in `lightning-bus up`), then roll back "
                f"and go on with: lightning-bus up {run.directory}"
            ) from exc
        yield


def roll_back(directory: Path, registry: Registry, number: int) -> Progress:
    """Make the newest checkpoint of a run hold version `number` again, under the next number. Returns its progress.

    To be called inside `untrained`. Raises Conflict when there is nothing to go back from, NotFound for an unknown
    version or one whose file is gone, and ValueError for a damaged one; then nothing has changed.
    """
    checkpoints = directory / "checkpoints"
    path = checkpoint.latest(checkpoints)
    if path is None:
        raise Conflict(f"{checkpoints} holds no checkpoint: nothing has been trained yet, so there is nothing to undo")
    current = checkpoint.read(path)
    now = current.extra
    newest = max(now["version"], -1 if registry.newest is None else registry.newest.version)
    target = registry.get(number)
    if number == newest:
        raise Conflict(f"version {number} is the newest: there is nothing to go back from")
    stored = _stored(target, directory)
    if stored.weights.keys() != current.weights.keys():
        raise Conflict(
            f"version {number} is the base that this run trains an adapter on, and no adapter: go back to a later version, "
            "or start a new run from it"
        )
    then = msgspec.convert(stored.extra, Progress)
    progress = msgspec.convert(now, Progress)
    # Imitation is not repeated: its rollouts lie before the stream's cursor, where nobody looks any more.
    progress.phase, progress.step, progress.rewards = "rl", then.step, then.rewards
    progress.version, progress.parent, progress.rolled_back = newest + 1, number, newest + 1
    progress.trained, progress.line = [], {}
    progress.checkpoints += 1
    with storing(checkpoints):
        checkpoint.save_again(checkpoints, progress.checkpoints, stored, msgspec.to_builtins(progress))
    return progress


@dataclass(frozen=True, slots=True)
class Published:
    """How far the newest checkpoint's version came: on the bus, and to how many replicas. `reason`: why not further."""

    recorded: bool = False
    served: int = 0
    reason: str = ""


async def publish(run: RunFile, bus_address: str, engine_urls: Sequence[str], limit_s: float) -> Published:
    """Publish the newest checkpoint's version and push it to these replicas, as far as bus and replicas answer.

    To be called inside `untrained`. What is not done here is done by whoever trains next.
    """
    async with AsyncExitStack() as stack:
        try:
            bus = await stack.enter_async_context(Client(bus_address, role="trainer", limit_s=limit_s))
        except BrokenError:
            return Published(reason=f"no broker answers at {bus_address}")
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        session = Session(run, bus, http, engine_urls)
        stack.callback(session.close)
        session.resume()
        if not engine_urls:
            await session.record()
            return Published(recorded=True, reason="no replica is ready")
        try:
            await session.publish()
        except BrokenError as exc:
            return Published(recorded=True, reason=str(exc))
        return Published(recorded=True, served=session.fleet.current)


def export(run: RunFile, version: WeightVersion, target: Path) -> None:
    """Write a version as a directory that `lightning-bus serve` and any Hugging Face loader take.

    Raises Conflict when the directory exists and is not empty, NotFound when the version's file is gone, CallError when
    it is damaged.
    """
    _refuse_taken(target)
    policy = run.directory / "policy"
    weights = with_base(_stored(version, run.directory).weights, file_of(version, run.directory))
    model = load_policy(policy)
    own = dict(named_weights(model))
    if own.keys() != weights.keys():
        other = sorted(own.keys() ^ weights.keys())[0]
        raise CallError(f"version {version.version} is of another model than {policy}: {other} is in one of them only")
    live = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in weights.items():
            live[name].copy_(tensor)
    with storing(target):
        save_policy(model, load_tokenizer(policy), target)


def export_adapter(run: RunFile, version: WeightVersion, target: Path) -> None:
    """Write a version's adapter alone, as peft and vLLM load it onto the run's first policy.

    Raises as `export`, and CallError for a version that was trained without one.
    """
    _refuse_taken(target)
    try:
        config, weights = adapter_of(version, run.directory)
    except (ValueError, OSError) as exc:
        raise CallError(f"version {version.version} cannot be written as an adapter: {exc}") from exc
    base = (run.directory / "policy").resolve()
    with storing(target):
        write_adapter(target, {**config, "base_model_name_or_path": str(base)}, weights)


def _refuse_taken(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{target} exists and is not empty. Name a new directory.")


def _stored(version: WeightVersion, directory: Path) -> checkpoint.Stored:
    """Return all that is kept of a version. The first policy is a model directory: it was never trained."""
    path = file_of(version, directory)
    try:
        if path.is_dir():
            return checkpoint.of_model(load_policy(path), msgspec.to_builtins(Progress(version=version.version)))
        stored = checkpoint.read(path)
        check_is(version, path, stored.extra)
    except (ValueError, OSError) as exc:
        raise CallError(f"version {version.version} cannot be read: {exc}") from exc
    return stored
