"""`lightning-bus train`: the whole run, from the first policy to the summary.

Each stage is skipped when the checkpoint says that it is behind us, so a trainer that was killed goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import torch

from lightning_bus import (
    CallError,
    Client,
    Conflict,
    RunFile,
    StopProcess,
    StorageError,
    monotonic_s,
    reward_hooks,
    wall_ns,
)
from lightning_bus.adapters import Cursor, RewardsSection
from trainer.algorithms.evaluate import evaluate
from trainer.algorithms.rl import reinforce
from trainer.algorithms.sft import imitate
from trainer.config import TrainSection
from trainer.data.stream import RolloutStream
from trainer.loading import load_tasks
from trainer.optimize import checkpoint
from trainer.report import count_log, plot_reward, write_summary
from trainer.session import Session, storing

log = logging.getLogger(__name__)

POLICY_LIMIT_S = 180.0  # the engine writes the first policy when it starts
WRITER_LIMIT_S = 60.0  # a rollback takes seconds, a trainer that was told to stop a step


async def train(run: RunFile, *, bus_address: str, engine_urls: list[str]) -> dict[str, Any]:
    """Carry out the run and return its summary, which is also in summary.json."""
    config = run.section(TrainSection)
    torch.set_num_threads(config.torch_threads)
    tasks = load_tasks(config.tasks, run.run.seed, "train.tasks")
    held_out = load_tasks(config.held_out, run.run.seed, "train.held_out")
    await wait_for_policy(run.directory / "policy")
    summary: dict[str, Any] = {}
    async with (
        sole_writer(run.directory),
        Client(bus_address, role="trainer", log=log_beside(run.directory, bus_address)) as bus,
        httpx.AsyncClient() as http,
        reward_hooks(run.section(RewardsSection)) as hooks,
        anyio.create_task_group() as background,
    ):
        session = Session(run, bus, http, engine_urls)
        session.resume()
        progress = session.progress
        stream = RolloutStream(
            bus,
            config.rl.group_size,
            msgspec.convert(progress.stream, Cursor),
            config.rollout_limit_s,
            hooks=hooks,
        )
        background.start_soon(stream.run)
        background.start_soon(session.fleet.run)
        try:
            await run_stages(session, stream, tasks, held_out)
            await session.fleet.settle()
            summary = await summarise(session)
        except (CallError, StopProcess, anyio.get_cancelled_exc_class()):
            session.close()  # this process will not be started again by itself, so nobody needs the weights in memory
            raise
        session.close()
        background.cancel_scope.cancel()
    return summary


@asynccontextmanager
async def sole_writer(run_directory: Path, limit_s: float = WRITER_LIMIT_S) -> AsyncGenerator[None]:
    """Be the one process that writes this run's checkpoints. Raises Conflict when another still does after limit_s."""
    until_s = monotonic_s() + limit_s
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(checkpoint.writing(run_directory / "checkpoints"))
                break
            except BlockingIOError as exc:
                if monotonic_s() >= until_s:
                    raise Conflict(
                        f"another process trains {run_directory}: it has held {run_directory / 'checkpoints'} for "
                        f"{limit_s:g} s. A run has one trainer; stop that one first."
                    ) from exc
            except OSError as exc:
                raise StorageError(f"cannot write {run_directory / 'checkpoints'}: {exc}") from exc
            await anyio.sleep(0.1)
        yield


def log_beside(directory: Path, bus_address: str) -> Path | None:
    """Return the run's log when its broker is on this machine: reading it there is faster than asking for it."""
    here = bus_address.startswith(("ipc://", "tcp://127.", "tcp://localhost:"))
    return directory / "log" if here and (directory / "log").is_dir() else None


async def run_stages(session: Session, stream: RolloutStream, tasks: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Evaluate, imitate, evaluate, reinforce, evaluate; whatever the checkpoint says is behind us is skipped."""
    progress = session.progress
    if progress.phase != "sft":  # in the middle of imitation the weights are no version, and version 0 is out already
        await session.publish()
    if progress.line:  # a life that ended between checkpoint and this line left it to us
        session.tell(progress.line)
    if progress.phase in ("init", "sft"):
        if progress.step == 0:
            await evaluate(session, stream, held_out)
        if session.train.sft.rollouts:
            await imitate(session, stream, tasks)
        else:
            progress.phase = "rl"
    if progress.phase == "rl":
        if progress.step == 0:
            await evaluate(session, stream, held_out)
        await reinforce(session, stream, tasks, held_out)
    await cancel_unfinished(session)
    await evaluate(session, stream, held_out)


async def cancel_unfinished(session: Session) -> None:
    """End the rollouts that ran ahead of the last step: nobody will train on them."""
    size = session.train.rl.group_size
    ids = [
        f"train-{group:05d}-{member}" for group in range(session.progress.submitted_groups) for member in range(size)
    ]
    for start in range(0, len(ids), 1000):
        await session.bus.cancel(ids[start : start + 1000])


async def summarise(session: Session) -> dict[str, Any]:
    """Count the log, write summary.json, reward.png and the final checkpoint."""
    counts = await count_log(session.bus)
    evals = session.progress.evals
    after_sft = "1" if session.train.sft.rollouts else "0"
    summary: dict[str, Any] = {
        "success_before_sft": evals.get("0"),
        "success_before_rl": evals.get(after_sft),
        "success_after_rl": evals.get(str(session.progress.version)),
        "seconds": round((wall_ns() - session.progress.started_ns) / 1e9, 1),
        **{key: counts[key] for key in SUMMARY_COUNTS},
        "rl_steps": session.progress.step,
        "seed": session.run.run.seed,
    }
    session.export()
    with storing(session.directory):
        plot_reward(session.directory / "reward.png", list(session.metrics.lines()), session.run.run.name)
        write_summary(session.directory / "summary.json", summary)
    return summary


SUMMARY_COUNTS = (
    "rollouts_submitted", "rollouts_succeeded", "rollouts_failed", "rollouts_cancelled", "model_calls", "policy_versions",
)  # fmt: skip


async def wait_for_policy(directory: Path) -> None:
    """Return once the first policy is there; `lightning-bus serve` writes it."""
    with anyio.move_on_after(POLICY_LIMIT_S):
        while not (directory / "config.json").exists():  # noqa: ASYNC110 - another process writes it
            await anyio.sleep(0.1)
        return
    raise CallError(
        f"no policy appeared in {directory} within {POLICY_LIMIT_S:g} s. Start it with: lightning-bus serve --run …"
    )
