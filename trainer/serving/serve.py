"""The engine as a daemon: make the first policy, load the newest weights, serve until stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio.to_thread
import msgspec

from lightning_bus import POLICY_WEIGHTS, Client, ConfigError, WeightVersion, serve_http
from trainer.config import PolicySection, ServeSection
from trainer.loading import import_named
from trainer.policy.model import move_into_place
from trainer.serving.app import build_app
from trainer.serving.chat import Script
from trainer.serving.engine import Engine
from trainer.serving.errors import WeightUpdateError
from trainer.serving.weights import describe_weights

log = logging.getLogger(__name__)


async def serve_policy(
    section: ServeSection, policy: PolicySection, directory: Path, *, seed: int, bus_address: str | None,
    started: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve the policy in `directory` until cancelled, under the newest weights that the bus knows of, if any."""
    scripted = load_scripts(section.scripted)
    with Engine.from_directory(
        directory,
        version="0",
        rows_max=section.slots_max,
        waiting_max=section.waiting_max,
        torch_threads=section.torch_threads,
        seed=seed,
    ) as engine:
        if bus_address is not None:
            await load_newest_weights(engine, bus_address)
        app = build_app(engine, model_name=policy.name, scripted=scripted)
        await serve_http(app, section.bind, key="serve.bind", started=started)


def ensure_policy(policy: PolicySection, run_directory: Path, seed: int) -> Path:
    """Return the directory of the first policy, `<run>/policy`, having made it if it was not there.

    Written beside and moved into place, so that a trainer that waits for it never reads half a model.
    """
    target = run_directory / "policy"
    if not target.exists():
        if ":" not in policy.model:
            return _linked(Path(policy.model), target)
        build = import_named(policy.model, "policy.model")
        partial = target.with_name(".policy.partial")
        partial.mkdir(parents=True, exist_ok=True)
        build(partial, seed)
        move_into_place(partial, target)
    return target


async def load_newest_weights(engine: Engine, bus_address: str) -> None:
    """Take over the newest published weights: an engine that restarts must not answer under old ones.

    When their file cannot be read (another machine, or shared memory was emptied) the engine starts under version
    "0" and says so in every answer, until the trainer pushes.
    """
    async with Client(bus_address, role="serve") as bus:
        resource = await bus.get(POLICY_WEIGHTS)
    if resource is None:
        return
    newest = msgspec.msgpack.decode(resource.body, type=WeightVersion)
    try:
        file = await anyio.to_thread.run_sync(describe_weights, Path(newest.path), newest.checksum)
        engine.load_weights(file, str(newest.version))
    except (OSError, WeightUpdateError) as exc:
        log.warning(
            "weight version %s is not readable here, waiting for the trainer to push it: %s", newest.version, exc
        )


def load_scripts(named: Mapping[str, str]) -> dict[str, Script]:
    """Return the functions of [serve] scripted by model name."""
    return {name: import_named(source, f"serve.scripted.{name}") for name, source in named.items()}


def _linked(model: Path, target: Path) -> Path:
    """Make an existing model directory the run's first policy, without copying it."""
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"policy.model = {str(model)!r} is neither MODULE:FUNCTION nor a model directory (no config.json in it)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(model.resolve(), target_is_directory=True)
    return target
