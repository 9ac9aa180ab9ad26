"""A broker that is killed, again and again, under load: 200 times, in four rings side by side.

Real processes, real disk, SIGKILL in the middle of whatever the broker is doing, opening its log included. The clients
never hear of it but as latency; afterwards what they were told is compared with what the log holds (see history.py).
Not watched: power loss, for the kernel outlives the kill; test_power_loss.py does.
"""

from __future__ import annotations

import random
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.crash.broker_lives import BrokerLives
from tests.crash.callers import calling
from tests.crash.history import History

pytestmark = [pytest.mark.crash, pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(900)]

RINGS = 4
KILLS_PER_RING = 50
ACKS_PER_LIFE_MAX = 120
STILLBORN = 0.15  # of the lives are over before the broker is bound


async def live(directory: Path, seed: int, history: History) -> None:
    with BrokerLives(directory) as lives:
        await ring(directory, seed, history, lives)


async def ring(directory: Path, seed: int, history: History, lives: BrokerLives) -> None:
    dice = random.Random(seed)
    async with calling(lives.address, history.on_event) as callers:
        for role, name in [("produce", "p0"), ("produce", "p1"), ("train", "t0"), ("work", "w0"), ("work", "w1")]:
            await callers.add(role, name)
        await history.wait_more_acks(10)
        while lives.kills < KILLS_PER_RING:
            await history.wait_more_acks(dice.randint(1, ACKS_PER_LIFE_MAX))
            await anyio.to_thread.run_sync(lives.kill)
            while lives.kills < KILLS_PER_RING and dice.random() < STILLBORN:
                lives.start(wait=False)
                await anyio.to_thread.run_sync(lives.kill)
            await anyio.to_thread.run_sync(lives.start)
        await callers.finish("p", "t")
        await callers.finish("w")
    await anyio.to_thread.run_sync(lives.kill)
    history.check(directory)


async def test_what_was_acknowledged_survives_200_kills_exactly_once(tmp_path: Path) -> None:
    histories = [History() for _ in range(RINGS)]
    async with anyio.create_task_group() as tasks:
        for seed, history in enumerate(histories):
            tasks.start_soon(live, tmp_path / f"log{seed}", seed, history)
    assert sum(history.acks for history in histories) > 10 * RINGS * KILLS_PER_RING
    assert all(history.done and history.appended and history.cursors for history in histories)
