"""Clients behind a network that delays, cuts in the middle of a message, resets and goes silent.

Real processes around one broker: three reach it through the proxy, three directly. Watched: history.py's promises for
all of them; that the far ones go on after every fault, and the near ones all the while.
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
from tests.crash.proxy import Proxy, proxy_before

pytestmark = [pytest.mark.crash, pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(600)]

FAR = {"p-far": "produce", "t-far": "train", "w-far": "work"}
NEAR = {"p-near": "produce", "t-near": "train", "w-near": "work"}
FAULTS = 30
FREEZES = 2
DELAY_S = 0.01
CUT_BYTES_MAX = 4000  # a few messages


async def test_a_bad_network_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    history = History()
    dice = random.Random(7)
    with BrokerLives(tmp_path / "log") as lives:
        async with proxy_before(lives.address) as proxy, calling(lives.address, history.on_event) as callers:
            for name, role in NEAR.items():
                await callers.add(role, name)
            for name, role in FAR.items():
                await callers.add(role, name, proxy.address)
            await history.wait_until(lambda: all(history.acks_of[name] for name in [*NEAR, *FAR]))
            for _ in range(FAULTS):
                await history.wait_more_acks(dice.randint(1, 40), *FAR)
                spoil(proxy, dice)
            for _ in range(FREEZES):
                await history.wait_more_acks(20, *FAR)
                await freeze(proxy, history)
            proxy.delay_s = 0.0
            await callers.finish("p", "t")
            await callers.finish("w")
        await anyio.to_thread.run_sync(lives.kill)
    history.check(tmp_path / "log")
    assert proxy.accepted > FAULTS // 2


def spoil(proxy: Proxy, dice: random.Random) -> None:
    match dice.choice(["cut", "cut", "reset", "delay"]):
        case "cut":
            proxy.cut(dice.randint(1, CUT_BYTES_MAX))
        case "reset":
            proxy.reset()
        case _:
            proxy.delay_s = DELAY_S - proxy.delay_s


async def freeze(proxy: Proxy, history: History) -> None:
    """Go silent, and wait until the far ones have found out and come back; the near ones must not notice."""
    accepted = proxy.accepted
    proxy.lets_in = anyio.Event()
    proxy.freeze()
    await history.wait_more_acks(200, *NEAR)  # while none of the far ones gets through
    await history.wait_until(lambda: proxy.accepted >= accepted + len(FAR))
    proxy.lets_in.set()
    for name in FAR:
        await history.wait_more_acks(1, name)
