"""The end of a daemon: asked once it ends in order, asked twice it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import anyio
import pytest

from lightning_bus.daemon import until_stopped

pytestmark = pytest.mark.anyio

SLOW_TO_END = """
import anyio
from lightning_bus.daemon import run_daemon

async def main():
    try:
        print("up", flush=True)
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            print("ending", flush=True)
            await anyio.sleep_forever()

run_daemon(main)
"""


async def test_one_signal_lets_main_end_in_order() -> None:
    ended: list[str] = []

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            ended.append("in order")

    assert await until_stopped(main, abort=ended.append) == signal.SIGTERM
    assert ended == ["in order"]


async def test_a_second_signal_is_heard_while_main_is_ending() -> None:
    aborted: list[int] = []
    second = anyio.Event()

    def abort(code: int) -> None:
        aborted.append(code)
        second.set()

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                os.kill(os.getpid(), signal.SIGINT)
                await second.wait()

    assert await until_stopped(main, abort) == signal.SIGTERM
    assert aborted == [128 + signal.SIGINT]


def test_a_process_that_is_signalled_twice_is_gone_with_that_exit_code() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_END], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGTERM)
        assert "stopped without waiting" in process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGTERM
