"""A trainer over a recorded log, in lives that can be killed: python -m tests.journeys.recorded_trainer RUN_DIR

On several ranks, once:  torchrun --nproc-per-node 2 -m tests.journeys.recorded_trainer RUN_DIR once

What learns is real: the stream of groups, batches, the loop, steps, checkpoints, metrics. What is not there are broker
and engines: the log was recorded before, so nothing is submitted, published or pushed. For each line on stdin a child is
forked, which resumes and trains on, and its process id is printed; then, once it is gone, its exit status. Forking
spares each life the seconds of importing torch. A line such as "before 7" has the child killed before it writes
checkpoint 7: see `die_at`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import torch

from lightning_bus import Record, RunFile, load_run
from lightning_bus.adapters import Cursor
from lightning_bus.log.reader import LogReader
from trainer.algorithms.rl import reinforce
from trainer.config import TrainSection
from trainer.data.stream import RolloutStream
from trainer.optimize import checkpoint
from trainer.ranks import join
from trainer.session import Session
from trainer.training import dismiss, follow, settled

torch.set_num_threads(1)


class RecordedBus:
    """Yields what the log holds, and then nothing more."""

    session = b"nobody"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def follow(self, offset: int) -> AsyncGenerator[Record]:
        with LogReader(self.directory / "log") as reader:
            for record in reader.records(offset):
                yield record
                await anyio.lowlevel.checkpoint()
        await anyio.sleep_forever()


class RecordedStream(RolloutStream):
    async def wait_version_called(self, version: int) -> None:
        """Nobody calls new versions in a log of the past."""


class RecordedSession(Session):
    """Keeps beside metrics.jsonl what each version learnt from, in the order in which it was learnt."""

    async def publish(self) -> None:
        line = {"version": self.progress.version, "trained": msgspec.to_builtins(self.progress.trained)}
        with (self.directory / "batches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    async def retain(self) -> None:
        checkpoint.drop_old(self.checkpoints, self.train.keep_checkpoints)


async def live(run: RunFile) -> None:
    """Go on from the newest checkpoint to the end of the run, as `trainer.training` does."""
    config, world = run.section(TrainSection), join("cpu")
    algorithm = settled(run)
    if not world.leads:
        follow(world, run, algorithm)
        return
    with checkpoint.writing(run.directory / "checkpoints"):
        session = RecordedSession(run, RecordedBus(run.directory), None, [], world)  # pyright: ignore[reportArgumentType]
        session.resume()
        if session.progress.version:
            await session.publish()
        if session.progress.line:
            session.tell(session.progress.line)
        cursor = msgspec.convert(session.progress.stream, Cursor)
        stream = RecordedStream(session.bus, config.rl.group_size, cursor, config.rollout_limit_s)
        async with anyio.create_task_group() as background:
            background.start_soon(stream.run)
            session.progress.phase = "rl"
            await reinforce(session, stream, [], [], algorithm)
            dismiss(session.model)
            background.cancel_scope.cancel()


def main(directory: Path) -> None:
    run = load_run(directory)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                if line.strip() != "live":
                    moment, number = line.split()
                    die_at(moment, int(number))
                anyio.run(live, run)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        say(child)
        say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def die_at(moment: str, number: int) -> None:
    """Have this process killed by SIGKILL when checkpoint `number` is due.

    moment  "before" it is written, "torn": half of it is, "inside": all of it is and it has not its name yet, or "after"
            it is durable
    """
    save, rename = checkpoint.save, os.replace

    def dying_save(directory: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if (moment, number) == ("before", step):
            os.kill(os.getpid(), signal.SIGKILL)
        path = save(directory, step, *args, **kwargs)
        if (moment, number) == ("after", step):
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    def dying_rename(source: Path, target: Path) -> None:
        if moment in ("torn", "inside") and Path(target).name == checkpoint.path_of(Path(), number).name:
            if moment == "torn":
                os.truncate(source, os.stat(source).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    checkpoint.save, os.replace = dying_save, dying_rename


def say(what: Any) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["once"]:
        anyio.run(live, load_run(Path(sys.argv[1])))
    else:
        main(Path(sys.argv[1]))
