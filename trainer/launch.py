"""The further processes of a trainer on this machine, where RUN.toml asks for some and torchrun has not started them.

    async with other_ranks(run, size) as store:      # ranks 1, 2, … run `lightning-bus train` on the same RUN.toml
        world = join(device, store, size)

What always holds: none of them outlives this process, for their stdin is a lifeline; they keep nothing that must survive
them, so they may be killed at any time; and one that dies ends this process, which goes on from its checkpoint when it
is started again. So whoever started this process sees one process that lives, ends or dies, with its exit code: a
torchrun in between would make all of them 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import Process
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] - where torch documents them

from lightning_bus import LIFELINE, BrokenError, CallError, ConfigError, RunFile
from trainer.ranks import MEETING, MEETING_LIMIT

END_LIMIT_S = 20.0  # for a rank that was told that all is done, and for a step in which one has died
NEWS_LIMIT_S = 10.0  # a process that is gone is reported at once, on a machine that is not busy
HOST = "127.0.0.1"


@asynccontextmanager
async def other_ranks(run: RunFile, size: int) -> AsyncGenerator[Store | None]:
    """Keep ranks 1 … size − 1 of a run running while the context lasts, and yield where all of them meet.

    Yields None, having started nothing, for a size of 1 and where this process was itself started as one of several.
    Raises BrokenError when one of them dies, and ConfigError when one cannot train, or torchrun started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "0"))
    if started > 1 and size not in (1, started):
        raise ConfigError(
            f"train.processes is {size}, and {started} processes were started (WORLD_SIZE): leave one of the two out"
        )
    if size == 1 or started > 1:
        yield None
        return
    # Port 0: the system chooses one, and nobody can take it before it is used.
    store = TCPStore(HOST, 0, size, is_master=True, timeout=MEETING_LIMIT, wait_for_workers=False)
    ranks: dict[int, Process] = {}
    # A step that waits for a rank that is gone may not be woken by that, on a GPU: then there is no other way out.
    giving_up = threading.Timer(END_LIMIT_S, os._exit, args=(BrokenError.exit_code,))
    giving_up.daemon = True
    try:
        for rank in range(1, size):
            with anyio.CancelScope(shield=True):  # a process that exists must be known here
                ranks[rank] = await _start(run, rank, size, store.port)
        async with anyio.create_task_group() as watching:
            for rank, process in ranks.items():
                watching.start_soon(_watch, rank, process, giving_up)
            try:
                yield store
            except Exception as exc:
                if _of_torch(exc):  # a connection that broke is noticed before the news of why
                    with anyio.move_on_after(NEWS_LIMIT_S):
                        await anyio.sleep_forever()
                raise
            with anyio.move_on_after(END_LIMIT_S):
                for process in ranks.values():
                    await process.wait()
            watching.cancel_scope.cancel()
    finally:
        giving_up.cancel()
        with anyio.CancelScope(shield=True):
            for process in ranks.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()
                await process.aclose()


async def _start(run: RunFile, rank: int, size: int, port: int) -> Process:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), MEETING: f"{HOST}:{port}"}
    return await anyio.open_process(
        [sys.executable, "-m", "lightning_bus.cli", "train", "--run", str(run.path)],
        stdin=subprocess.PIPE,  # the lifeline
        stdout=None,
        stderr=None,
        start_new_session=True,  # a Ctrl-C is for the first rank, which ends the others
        env={**os.environ, **place, LIFELINE: "1"},
    )


async def _watch(rank: int, process: Process, giving_up: threading.Timer) -> None:
    """Return when the rank has ended well. Raises what its end means otherwise."""
    code = await process.wait()
    if code == 0:
        return
    if not giving_up.is_alive():
        giving_up.start()
    how = f"rank {rank} of this trainer ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
    if code == CallError.exit_code:
        raise ConfigError(f"{how}; why stands above")
    raise BrokenError(f"{how}. The run goes on from its last checkpoint")


def _of_torch(exc: Exception) -> bool:
    """Whether the exception, or one in the group that it is, comes from a collective call that failed."""
    return isinstance(exc, RuntimeError) or (isinstance(exc, ExceptionGroup) and bool(exc.subgroup(RuntimeError)))
