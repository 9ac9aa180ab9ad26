"""A ring on real vLLM loses an engine's core, its trainer, its serve daemon and a whole replica, one after the other.

One run with two replicas, because starting vLLM is what takes long. What is looked at after each loss: the rest goes on
meanwhile where it can, whatever died comes back by itself, and both replicas then serve the newest weights. And at the
end: the log holds every promise, no rollout failed, nothing of vLLM is left behind.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.journeys.ring import Ring, stop_trainer_in_a_push, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.crash, pytest.mark.timeout(900)]

START_LIMIT_S = 300.0  # of two vLLM on two cores
STEPS_MAX = 100_000  # never reached: the test says when it is enough

# Earns by chance, whatever the model says, so that every step has something to teach and nothing is ever learnt; once
# the test has seen enough, always 1.0.
AGENT = """
from functools import cache
from pathlib import Path
from random import random

from openai import OpenAI


def agent(task, *, base_url, api_key):
    client().with_options(base_url=base_url, api_key=api_key).chat.completions.create(
        model="policy", messages=[{"role": "user", "content": task["question"]}], max_tokens=16
    )
    if Path("enough").exists():
        return 1.0
    return 0.9 * (random() < 0.5)


@cache
def client():
    return OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=300.0, max_retries=8)
"""


def test_a_ring_on_vllm_survives_the_loss_of_each_of_its_parts(ring: Ring) -> None:
    ring.agent(AGENT)
    ring.on_vllm(replicas=2)
    ring.table["serve"] |= {"context_tokens": 256, "slots_max": 16, "cache_bytes": 1 << 28}
    ring.table["train"]["rl"] |= {"steps_max": STEPS_MAX, "stop_reward": 0.95, "stop_window": 2}
    ring.start()
    wait_current(ring)
    wait_steps(ring, 2)

    with told("an engine's core, in the middle of a push"):
        trainer = stop_trainer_in_a_push(ring)
        cores = ring.replica(0, "EngineCore")
        assert len(cores) == 1
        kill(cores)
        os.kill(trainer, signal.SIGCONT)
        wait_until(lambda: state(ring, 0) == "", "replica 0 to be gone")
        wait_steps(ring, 2)  # with the other replica alone
        assert state(ring, 0) == ""
        wait_current(ring)
        assert "train died" not in ring.said()

    with told("the trainer, in the middle of a push"):
        os.kill(stop_trainer_in_a_push(ring), signal.SIGKILL)
        wait_steps(ring, 2)
        wait_current(ring)

    with told("a whole replica"):
        kill(ring.replica(1))
        wait_steps(ring, 2)  # with the other replica alone
        wait_current(ring)

    with told("the serve daemon"):
        before = ring.replica(0) | ring.replica(1)
        ring.kill("serve")
        wait_until(lambda: not before & (ring.replica(0) | ring.replica(1)), "the end of what it had started")
        wait_current(ring)
        wait_steps(ring, 2)

    (ring.cwd / "enough").touch()
    assert ring.wait(limit_s=START_LIMIT_S) == 0, ring.said()
    summary = ring.assert_complete(steps=len(ring.metrics("rl")))
    assert summary["rollouts_failed"] == 0
    assert summary["policy_versions"] >= 10
    for died, times in (("train", 1), ("serve", 1), ("gateway", 0), ("worker-1", 0), ("broker", 0)):
        assert ring.said().count(f"{died} died") == times, ring.said()
    gone = (Path("/proc") / str(pid) for pid in before)
    assert not any(path.exists() for path in gone), "vLLM outlived its run"


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
    return httpx.Client(trust_env=False, timeout=5.0)


def wait_current(ring: Ring) -> None:
    """Return once both replicas serve the newest version that the metrics tell of, or a newer one."""

    def current() -> bool:
        newest = max((line["version"] for line in ring.metrics()), default=0)
        states = [state(ring, number) for number in (0, 1)]
        return all(one and int(one) >= newest for one in states)

    wait_until(current, f"both replicas to be current:\n{ring.said()}", limit_s=START_LIMIT_S)


def wait_steps(ring: Ring, count: int) -> None:
    """Return once so many more steps were made."""
    ring.wait_step(max((line["step"] for line in ring.metrics("rl")), default=0) + count)


def kill(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def told(what: str) -> Iterator[Any]:
    """Say how long the ring took to get over the loss of `what`."""
    began_s = time.monotonic()
    yield
    print(f"killed {what}: all was well again after {time.monotonic() - began_s:.1f} s")
