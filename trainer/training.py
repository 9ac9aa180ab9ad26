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
import anyio.to_thread
import httpx
import msgspec
import torch
from transformers import PreTrainedModel

from lightning_bus import (
    CallError,
    Client,
    Conflict,
    CreditSection,
    RunFile,
    StopProcess,
    StorageError,
    monotonic_s,
    reward_hooks,
    wall_ns,
)
from lightning_bus.adapters import RewardsSection, Selection
from trainer.algorithms.admission import cancel_unfinished
from trainer.algorithms.base import Algorithm
from trainer.algorithms.chosen import algorithm_of
from trainer.algorithms.evaluate import evaluate
from trainer.algorithms.rl import reinforce
from trainer.algorithms.sft import imitate, read_conversations
from trainer.config import PolicySection, TrainSection, check_schedule
from trainer.data.stream import RolloutStream, beginning
from trainer.launch import other_ranks
from trainer.loading import load_tasks
from trainer.optimize import checkpoint, following, losses
from trainer.optimize.determinism import be_deterministic
from trainer.ranks import World, join, lead, leave
from trainer.refusals import as_config_error, refuse_directory, refuse_unreadable
from trainer.report import count_log, plot_reward, write_summary
from trainer.session import Session, storing
from trainer.sinks import refuse_missing

log = logging.getLogger(__name__)

POLICY_LIMIT_S = 180.0  # the engine writes the first policy when it starts
WRITER_LIMIT_S = 60.0  # a rollback takes seconds, a trainer that was told to stop a step


async def train(
    run: RunFile, *, bus_address: str, engine_urls: list[str], algorithm: Algorithm | None = None
) -> dict[str, Any]:
    """Carry out the run and return its summary, which is also in summary.json.

    algorithm  default: the one that [train.rl] names
    """
    config = run.section(TrainSection)
    algorithm = settled(run, algorithm)
    tasks = load_tasks(config.tasks, run.run.seed, "train.tasks")
    held_out = load_tasks(config.held_out, run.run.seed, "train.held_out")
    await wait_for_policy(run.directory / "policy")
    refuse_directory(run.directory / "policy")
    _set_torch(run)
    async with other_ranks(run, config.processes) as store:
        world = await anyio.to_thread.run_sync(join, config.device, store, config.processes)
        if world.leads:
            return await _lead(world, run, bus_address, engine_urls, algorithm, tasks, held_out)
        await anyio.to_thread.run_sync(follow, world, run, algorithm)
    return {}


def settled(run: RunFile, algorithm: Algorithm | None = None) -> Algorithm:
    """Return what the run learns by, having refused settings that only show their fault in use. Starts nothing.

    algorithm  default: the one that [train.rl] names

    Raises ConfigError.
    """
    config, credit = run.section(TrainSection), run.section(CreditSection)
    algorithm = algorithm_of(config.rl, credit) if algorithm is None else algorithm.credited(credit)
    Selection.of(credit.agents)  # a pattern that is none
    refuse_missing(config.log)
    refuse_unreadable(config.sft.files)
    rl = config.rl
    with as_config_error("train.rl"):
        total_updates = rl.schedule_updates or algorithm.num_updates(rl.steps_max)
        check_schedule(rl.schedule, rl.warmup_updates, total_updates, "updates of all steps")
    return algorithm


async def _lead(
    world: World,
    run: RunFile,
    bus_address: str,
    engine_urls: list[str],
    algorithm: Algorithm,
    tasks: Sequence[Any],
    held_out: Sequence[Any],
) -> dict[str, Any]:
    """Carry out the run, with the other ranks where there are some, and return its summary."""
    config, credit = run.section(TrainSection), run.section(CreditSection)
    summary: dict[str, Any] = {}
    async with (
        sole_writer(run.directory),
        Client(bus_address, role="trainer", log=log_beside(run.directory, bus_address)) as bus,
        httpx.AsyncClient() as http,
        reward_hooks(run.section(RewardsSection)) as hooks,
        anyio.create_task_group() as background,
    ):
        with as_config_error("this policy cannot be trained"):
            session = Session(run, bus, http, engine_urls, world)
        session.resume()
        progress = session.progress
        start = await beginning(bus, progress.stream)
        stream = RolloutStream(
            bus,
            config.rl.group_size,
            start,
            config.rollout_limit_s,
            hooks=hooks,
            policy=session.policy.name if len(credit.policies) > 1 else "",
            cursor_name=f"trainer/{session.published_as}",
        )
        await stream.commit(msgspec.to_builtins(start))
        background.start_soon(stream.run)
        background.start_soon(session.fleet.run)
        try:
            await run_stages(session, stream, tasks, held_out, algorithm)
            await session.fleet.settle()
            summary = await summarise(session)
            await stream.release()
        except (CallError, StopProcess, anyio.get_cancelled_exc_class()):
            session.close()  # this process will not be started again by itself, so nobody needs the weights in memory
            raise
        session.close()
        dismiss(session.model)
        background.cancel_scope.cancel()
    return summary


def train_along(world: World, run: RunFile, algorithm: Algorithm | None = None) -> None:
    """Train with the first process, which calls `train`, until it is done: what one of the others does instead."""
    _set_torch(run)
    follow(world, run, settled(run, algorithm))


def _set_torch(run: RunFile) -> None:
    config = run.section(TrainSection)
    torch.set_num_threads(config.torch_threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.deterministic:
        be_deterministic(run.run.seed)


def follow(world: World, run: RunFile, algorithm: Algorithm) -> None:
    """Train with the leader until it is done: what every rank but the first does."""
    with as_config_error("this policy cannot be trained"):
        model = following.policy_on(world, run.section(PolicySection), run.directory / "policy")
    following.follow(world, model, [losses.sft, algorithm.loss])
    leave()


def dismiss(model: PreTrainedModel) -> None:
    """Tell the ranks that follow that all is done, if there are any."""
    lead(model, "end")
    leave()


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


async def run_stages(
    session: Session,
    stream: RolloutStream,
    tasks: Sequence[Any],
    held_out: Sequence[Any],
    algorithm: Algorithm,
) -> None:
    """Evaluate, imitate, evaluate, reinforce, evaluate; whatever the checkpoint says is behind us is skipped."""
    progress, follows = session.progress, session.train.follow
    # Before anything else, so that a bad line ends the run now rather than after the first evaluation.
    imitates = progress.phase in ("init", "sft")
    conversations = await anyio.to_thread.run_sync(read_conversations, session) if imitates else []
    if progress.phase != "sft":  # in the middle of imitation the weights are no version, and version 0 is out already
        await session.publish()
        await session.refuse_other_tokens()
    if progress.line:  # a life that ended between checkpoint and this line left it to us
        session.tell(progress.line)
    if imitates:
        if progress.step == 0 and not follows:
            await evaluate(session, stream, held_out)
        if session.train.sft.wanted:
            await imitate(session, stream, tasks, conversations)
        else:
            progress.phase = "rl"
    if progress.phase == "rl":
        if progress.step == 0 and not follows:
            await evaluate(session, stream, held_out)
        await reinforce(session, stream, tasks, held_out, algorithm)
    await cancel_unfinished(session)
    if not follows:
        await evaluate(session, stream, held_out)


async def summarise(session: Session) -> dict[str, Any]:
    """Count the log, write summary.json, reward.png and the final checkpoint."""
    counts = await count_log(session.bus, session.published_as)
    evals = session.progress.evals
    after_sft = "1" if session.train.sft.wanted else "0"
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
