"""Where the lines of metrics.jsonl go besides: the console, TensorBoard, Weights & Biases, trackio.

    [train] log = ["console", "tensorboard", "wandb", "trackio"]

What always holds: metrics.jsonl has everything, so a sink may lose what it likes; one that is asked for and not
installed is a ConfigError before anything starts; one that fails later is told once, left out from then on, and never
stops training. A line is handed over once, also over restarts.

Names are the line's own, behind its phase and flattened by "/": rl/reward_mean, rl/dropped/stale, eval/held_out_success.
The x axis is the line's `step`; each phase counts its own, so no curve jumps where imitation ends. Numbers alone are
handed over. docs/metrics.md says what each name means.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from lightning_bus import ConfigError, RunFile
from trainer.config import PolicySection, TrainSection

log = logging.getLogger(__name__)

PACKAGES = {"console": "", "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
PHASES = ("teacher", "sft", "rl", "eval")

# What a person at a terminal looks for, in this order. The rest is in the file.
SHOWN = (
    "reward_mean", "held_out_success", "loss", "kl_k2", "entropy", "grad_norm", "staleness_mean", "tokens_per_s",
    "iteration_s", "idle_share",
)  # fmt: skip


class Sink(Protocol):
    """Takes the numbers of one line. Whatever it raises is told once, and it is not asked again."""

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All sinks of a run."""

    def __init__(self, run: RunFile, run_id: str) -> None:
        """run_id  under which a resumed run goes on; no other run has it"""
        self._sinks: dict[str, Sink] = {}
        names = run.section(TrainSection).log
        refuse_missing(names)
        for name in names:
            try:
                self._sinks[name] = _MAKERS[name](run, run_id)
            except Exception as exc:  # another project's code, its server, its login
                log.warning("[train] log: %s could not be started and is left out: %s", name, _reason(exc))

    def write(self, line: Mapping[str, Any]) -> None:
        """Hand a line of metrics.jsonl to every sink."""
        values = flattened(line)
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(values, int(line["step"]))
            except Exception as exc:
                del self._sinks[name]
                log.warning("[train] log: %s failed and is left out from now on: %s", name, _reason(exc))

    def close(self) -> None:
        """Let sinks write what they still hold."""
        while self._sinks:
            name, sink = self._sinks.popitem()
            try:
                sink.close()
            except Exception as exc:
                log.warning("[train] log: %s could not be closed: %s", name, _reason(exc))


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ConfigError for a sink whose package is not installed, with the command that installs it."""
    for name in names:
        package = PACKAGES[name]
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"[train] log asks for {name!r} and the package {package} is not installed: pip install {package}, or "
                "leave it out. metrics.jsonl is written in any case"
            )


def flattened(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line by their names behind its phase: {"rl/reward_mean": 0.5, "rl/dropped/stale": 2}."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, bool | int | float):
            found[name] = float(value) if isinstance(value, bool) else value

    for key, value in line.items():
        if key != "phase":
            add(f"{line['phase']}/{key}", value)
    return found


class _Console:
    def __init__(self, run: RunFile, run_id: str) -> None: ...

    def write(self, values: Mapping[str, float], step: int) -> None:
        phase = next(iter(values)).partition("/")[0]
        said = [f"{name} {values[f'{phase}/{name}']:.4g}" for name in SHOWN if f"{phase}/{name}" in values]
        log.info("%s step %d: %s", phase, step, ", ".join(said))

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in <run>/tensorboard: `tensorboard --logdir runs`."""

    def __init__(self, run: RunFile, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.directory / "tensorboard"))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if not name.endswith("/step"):  # which is the axis already
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: RunFile, run_id: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        # wandb lets an argument win over its environment variables, and makes a folder called wandb by itself.
        project = os.environ.get("WANDB_PROJECT") or run.section(TrainSection).log_project
        self._run = wandb.init(
            project=project, name=os.environ.get("WANDB_NAME") or run.run.name, id=run_id, resume="allow",
            dir=str(run.directory), config=_settings(run),
        )  # fmt: skip
        for phase in PHASES:  # its own step counts calls and never goes back; ours begins anew in every phase
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values))

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: RunFile, run_id: str) -> None:
        trackio: Any = importlib.import_module("trackio")
        project = run.section(TrainSection).log_project
        self._run = trackio.init(project=project, name=run_id, config=_settings(run), resume="allow")
        self._finish = trackio.finish

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({name: value for name, value in values.items() if not name.endswith("/step")}, step=step)

    def close(self) -> None:
        self._finish()


_MAKERS: dict[str, Any] = {"console": _Console, "tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _settings(run: RunFile) -> dict[str, Any]:
    """What of RUN.toml says how the run learns."""
    sections = {"policy": run.section(PolicySection), "train": run.section(TrainSection)}
    return {"seed": run.run.seed} | {name: msgspec.to_builtins(section) for name, section in sections.items()}


def _reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
