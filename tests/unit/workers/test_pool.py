"""The pool with real child processes: small Python programs in the worker's place."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import anyio
import pytest

from lightning_bus import CallError
from workers import pool
from workers.pool import describe, run_pool

pytestmark = pytest.mark.anyio
LIMIT_S = 60.0

CHILD = """
import os, pathlib, sys
here = pathlib.Path(sys.argv[1])
assert sys.argv[-2:] == ["--processes", "1"] and os.environ["LIGHTNING_BUS_LIFELINE"]
(here / f"started-{os.getpid()}").touch()
if sys.argv[2] == "once" and len(list(here.glob("started-*"))) == 1:
    os.kill(os.getpid(), 9)
if sys.argv[2] == "wrong":
    sys.exit(2)
assert sys.stdin.read() == ""
(here / f"ended-{os.getpid()}").touch()
"""


async def wait_until_started(here: Path, count: int) -> None:
    with anyio.fail_after(LIMIT_S):
        while marks(here, "started") < count:  # noqa: ASYNC110  another process has no event to give
            await anyio.sleep(0.01)


def marks(here: Path, what: str) -> int:
    """How many children have left that mark."""
    return len(list(here.glob(f"{what}-*")))


async def run_child(here: Path, how: str, processes: int) -> None:
    await run_pool([str(here), how], processes, grace_s=LIMIT_S, program=(sys.executable, "-c", CHILD))


async def test_children_end_in_order_when_their_lifeline_is_cut(tmp_path: Path) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_child, tmp_path, "steady", 2)
        await wait_until_started(tmp_path, 2)
        tasks.cancel_scope.cancel()
    assert marks(tmp_path, "ended") == 2


async def test_a_child_that_dies_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "PAUSE_S_MIN", 0.01)
    with caplog.at_level(logging.WARNING, "workers"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_child, tmp_path, "once", 1)
            await wait_until_started(tmp_path, 2)
            tasks.cancel_scope.cancel()
    assert [record.message for record in caplog.records] == [
        "worker process 1 ended (signal 9), starting again in 0.01 s"
    ]


async def test_a_call_that_is_wrong_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await run_child(tmp_path, "wrong", 1)
    assert isinstance(caught.value.exceptions[0], CallError)
    assert marks(tmp_path, "started") == 1


def test_exit_codes_are_told_in_words() -> None:
    assert (describe(-9), describe(70)) == ("signal 9", "exit code 70")
