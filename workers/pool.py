"""Several worker processes, so that agents in Python use several cores and one crash takes few attempts with it.

Each child is this very command with --processes 1. Its stdin is a lifeline: it ends when the parent is gone, however
that came about. What always holds: a child that dies is started again after a pause, and what it held is leased again
by the broker; a child that ends because its call is wrong (exit code 2) ends the pool, since every other would too.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
from anyio.abc import Process

from lightning_bus import LIFELINE, CallError, monotonic_s

PAUSE_S_MIN, PAUSE_S_MAX = 0.2, 5.0
STEADY_S = 30.0  # a child that lived this long was healthy: its next restart is quick again
KILL_AFTER_S = 5.0  # on top of the grace that a worker gives its attempts
CALL_ERROR = 2
PYTHON = (sys.executable, "-m", "lightning_bus.cli")

_log = logging.getLogger("workers")


async def run_pool(
    arguments: Sequence[str], processes: int, *, grace_s: float, program: Sequence[str] = PYTHON
) -> None:
    """Keep `processes` children running until cancelled, then let them end in order.

    arguments  of the command line, without --processes

    Raises CallError when a child says that the call is wrong; its stderr, which is ours, says why.
    """
    command = [*program, *arguments, "--processes", "1"]
    async with anyio.create_task_group() as tasks:
        for number in range(1, processes + 1):
            tasks.start_soon(_keep_running, command, number, grace_s)


async def _keep_running(command: list[str], number: int, grace_s: float) -> None:
    pause_s = PAUSE_S_MIN
    while True:
        started_s = monotonic_s()
        child = await anyio.open_process(
            command, stdin=subprocess.PIPE, stdout=None, stderr=None, env={**os.environ, LIFELINE: "1"}, cwd=Path.cwd()
        )
        try:
            code = await child.wait()
        finally:
            await _end(child, grace_s + KILL_AFTER_S)
        if code == CALL_ERROR:
            raise CallError(
                f"worker process {number} ended with exit code {code}: its call is wrong, see above. Fix it and start again."
            )
        if monotonic_s() - started_s > STEADY_S:
            pause_s = PAUSE_S_MIN
        _log.warning("worker process %d ended (%s), starting again in %g s", number, describe(code), pause_s)
        await anyio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)


async def _end(child: Process, limit_s: float) -> None:
    """Cut the lifeline and wait for the child; kill it when it takes too long."""
    with anyio.CancelScope(shield=True):
        assert child.stdin is not None
        await child.stdin.aclose()
        with anyio.move_on_after(limit_s):
            await child.wait()
        if child.returncode is None:
            child.kill()
            await child.wait()


def describe(code: int) -> str:
    """Return an exit code in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
