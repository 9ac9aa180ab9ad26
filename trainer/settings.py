"""Settings of `Trainer(settings=…)`: the keys of RUN.toml, dotted or as tables.

What always holds: a setting that an argument decides is refused, never ignored; what no setting names stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_bus import ConfigError
from trainer.algorithms.base import Algorithm

# What has an argument of its own, which decides more than the key: ports, files, who runs the agent.
SAID_BY = {
    "run.name": "Trainer(name=…)",
    "run.directory": "Trainer(directory=…)",
    "run.seed": "Trainer(seed=…)",
    "train.tasks": "fit(train_tasks=…)",
    "train.held_out": "fit(val_tasks=…)",
    "worker.agent": "fit(agent)",
    "worker.processes": "Trainer(n_workers=…)",
}


def refuse_said_elsewhere(settings: Mapping[str, Any], *, policy: Any, algorithm: Any) -> None:
    """Raise ConfigError for a setting that is an argument, or that contradicts one."""
    said_by = SAID_BY | ({"policy.model": "Trainer(policy=…)"} if policy else {})
    if algorithm:
        said_by["train.rl.algorithm"] = "Trainer(algorithm=…)"
    if isinstance(algorithm, Algorithm):
        said_by["train.rl.options"] = f"{type(algorithm).__name__}(…)"
    for path, argument in said_by.items():
        at: Any = settings
        for part in path.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        if at is not None:
            raise ConfigError(f"settings[{path!r}] is {at!r:.80}: say it by {argument} instead")


def as_tables(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the tables of RUN.toml."""
    table: dict[str, Any] = {}
    for path, value in settings.items():
        said: Any = as_tables(value) if isinstance(value, Mapping) else value
        for part in reversed(path.split(".")):
            said = {part: said}
        merge(table, said)
    return table


def merge(table: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay a table over another one, key by key."""
    for key, value in over.items():
        if isinstance(value, Mapping):
            under = table.get(key)
            table[key] = dict(under) if isinstance(under, dict) else {}
            merge(table[key], value)
        else:
            table[key] = value
