"""SIGKILL for every process of a ring in turn, and at the worst moments: the run ends as if nothing had happened.

Moments are chosen by what can be seen from outside: a step in metrics.jsonl, a checkpoint that appeared, an engine that
says it is paused. Where the moment is short the trainer is stopped (SIGSTOP) and looked at before it is killed; when
it was too late it goes on and the next step is tried, for as long as it takes: the runs are endless.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open

from lightning_bus import POLICY_WEIGHTS, WeightVersion
from lightning_bus.log.reader import LogReader
from tests.journeys.ring import Ring, stop_trainer_in_a_push, stop_trainer_when
from trainer.registry import read_log

pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(1800)]


def published(ring: Ring) -> WeightVersion:
    """Return the newest weight version that the log knows."""
    with LogReader(ring.run_dir / "log") as reader:
        newest = max((one for one in reader.resources() if one.name == POLICY_WEIGHTS), key=lambda one: one.version)
    return msgspec.msgpack.decode(newest.body, type=WeightVersion)


def newest_checkpoint(ring: Ring) -> Path:
    """Return the newest checkpoint on disk."""
    return max((ring.run_dir / "checkpoints").glob("step-*.safetensors"))


def version_in(checkpoint: Path) -> int:
    """Return the weight version that a checkpoint holds; a step without anything to learn from makes no new one."""
    with safe_open(checkpoint, framework="np") as opened:
        state = opened.get_tensor("state").tobytes()[4:]  # after its checksum
    return int(msgspec.msgpack.decode(state)["extra"]["version"])


def test_any_process_may_be_killed_and_the_run_ends_and_verifies(ring: Ring) -> None:
    ring.endless()
    ring.table["broker"] |= {"lease_s": 2.0, "max_attempts": 100}  # what a killed worker held is soon leased again
    ring.start()
    ring.wait_step(3)
    for stage in ("worker", "gateway", "serve", "train", "broker"):
        ring.kill(stage)
        ring.wait_steps(3)
    summary = ring.end()
    assert summary["rollouts_failed"] == 0
    for name in ("worker-1", "gateway", "serve", "train", "broker"):
        assert f"{name} died (signal 9), restarting" in ring.said()


def test_a_trainer_killed_between_checkpoint_and_publish_publishes_that_version(ring: Ring) -> None:
    ring.endless()
    ring.start()
    ring.wait_step(1)
    newest = newest_checkpoint(ring)

    def appeared() -> bool:
        return newest_checkpoint(ring) != newest

    def unpublished() -> bool:
        nonlocal newest
        newest = newest_checkpoint(ring)
        return version_in(newest) > published(ring).version

    trainer = stop_trainer_when(ring, appeared, unpublished)
    version = version_in(newest)
    os.kill(trainer, signal.SIGKILL)
    ring.wait_steps(2)
    summary = ring.end()
    log = (ring.run_dir / "logs" / "train.log").read_text(encoding="utf-8")
    resumed = re.search(r"resumed from .*: phase rl, step \d+, version (\d+)", log)
    assert resumed is not None
    assert int(resumed[1]) == version
    assert sorted(read_log(ring.run_dir).versions) == list(range(summary["policy_versions"]))


def test_a_trainer_killed_in_the_middle_of_a_push_pushes_again(ring: Ring) -> None:
    ring.endless()
    ring.start()
    ring.wait_step(1)
    os.kill(stop_trainer_in_a_push(ring), signal.SIGKILL)
    ring.wait_steps(2)
    ring.end()


def test_an_engine_killed_in_the_middle_of_a_push_comes_back_with_that_version(ring: Ring) -> None:
    ring.endless()
    ring.start()
    ring.wait_step(1)
    trainer = stop_trainer_in_a_push(ring)
    ring.kill("serve")
    os.kill(trainer, signal.SIGCONT)
    ring.wait_steps(2)
    ring.end()
    assert "train died" not in ring.said()
