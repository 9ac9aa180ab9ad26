"""A ring on real vLLM loses an engine's core, its trainer, its serve daemon and a whole replica, one after the other.

One run with two replicas, because starting vLLM is what takes long. What is looked at after each loss: the rest goes on
meanwhile where it can, whatever died comes back by itself, and both replicas then serve the newest weights. And at the
end: the log holds every promise, no rollout failed, nothing of vLLM is left behind. How fast any of it is, is not looked
at, so a replica that must not come back yet is kept from it: who would start it is made to stand.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import pytest

from tests.journeys.ring import AGENT, START_LIMIT_S, Ring, kill, stop, stop_trainer_in_a_push, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.crash, pytest.mark.timeout(5400)]


def test_a_ring_on_vllm_survives_the_loss_of_each_of_its_parts(ring: Ring) -> None:
    ring.agent(AGENT.replace("max_tokens=4", "max_tokens=16").replace("timeout=100.0", "timeout=300.0"))
    ring.on_vllm(replicas=2)
    ring.table["serve"] |= {"context_tokens": 256, "slots_max": 16, "cache_bytes": 1 << 28}
    ring.table["broker"]["max_attempts"] = 20
    ring.table["train"]["rollout_limit_s"] = START_LIMIT_S
    ring.endless()
    ring.start()
    wait_current(ring)
    wait_steps(ring)

    with told("an engine's core, in the middle of a push"):
        trainer = stop_trainer_in_a_push(ring)
        lose(ring, 0, "EngineCore", meanwhile=lambda: os.kill(trainer, signal.SIGCONT))
        assert "train died" not in ring.said()

    with told("the trainer, in the middle of a push"):
        os.kill(stop_trainer_in_a_push(ring), signal.SIGKILL)
        wait_steps(ring)
        wait_current(ring)

    with told("a whole replica"):
        lose(ring, 1)

    with told("the serve daemon"):
        before = ring.replica(0) | ring.replica(1)
        ring.kill("serve")
        wait_until(lambda: not before & (ring.replica(0) | ring.replica(1)), "the end of what it had started")
        wait_current(ring)
        wait_steps(ring)

    summary = ring.end(START_LIMIT_S)
    assert summary["rollouts_failed"] == 0
    assert summary["policy_versions"] >= 10
    for died, times in (("train", 1), ("serve", 1), ("gateway", 0), ("worker-1", 0), ("broker", 0)):
        assert ring.said().count(f"{died} died") == times, ring.said()


def lose(ring: Ring, number: int, word: str = "", meanwhile: Callable[[], object] = lambda: None) -> None:
    """Kill a replica, or those of its processes with this word, see the run go on without it, and see it come back."""
    serve = min(ring.pids("serve"))
    while True:
        wait_until(lambda: ring.replica(number, word), f"replica {number} to be killed")
        before = ring.replica(number)
        kill(ring.replica(number, word))
        meanwhile()
        wait_until(lambda before=before: not ring.replica(number) & before, f"the end of replica {number}")
        stop(serve)  # which starts it again, and without which it never becomes ready
        if not state(ring, number):
            break
        os.kill(serve, signal.SIGCONT)  # it was back before we looked
    wait_steps(ring)
    assert not state(ring, number)
    os.kill(serve, signal.SIGCONT)
    wait_current(ring)


def state(ring: Ring, number: int) -> str:
    """Return the weight version that a replica serves, or "" while it does not serve."""
    url = ring.table["gateway"]["upstreams"][number]
    try:
        # An engine that is dying may be well at one route and answer 500 at the next.
        client().get(f"{url}/health").raise_for_status()
        if client().get(f"{url}/is_paused").raise_for_status().json()["is_paused"]:
            return ""
        label = str(client().get(f"{url}/weight_info").raise_for_status().json()["weight_version"])
        return label if label.isdecimal() else ""
    except (httpx.HTTPError, ValueError):
        return ""


@cache
def client() -> httpx.Client:
    """Return one client for all looks: building another for each would cost more than the look."""
    return httpx.Client(trust_env=False, timeout=60.0)


def wait_current(ring: Ring) -> None:
    """Return once either replica has served the newest version that the metrics tell of now, or a newer one."""
    newest = max((line["version"] for line in ring.metrics()), default=0)
    for number in (0, 1):
        wait_until(
            lambda number=number: int(state(ring, number) or -1) >= newest,
            f"replica {number} to serve version {newest}",
            limit_s=START_LIMIT_S,
        )


def wait_steps(ring: Ring) -> None:
    """Return once two more steps were made."""
    ring.wait_steps(2, limit_s=START_LIMIT_S)


@contextmanager
def told(what: str) -> Iterator[Any]:
    """Say how long the ring took to get over the loss of `what`."""
    began_s = time.monotonic()
    yield
    print(f"killed {what}: all was well again after {time.monotonic() - began_s:.1f} s")
