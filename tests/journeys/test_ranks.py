"""Trainers of two processes in a real ring: one may be killed, and the run ends as that of one process would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.journeys.ring import LIMIT_S, Ring, kill, wait_until
from tests.journeys.test_face import ALGORITHM, SCRIPT, check
from tests.journeys.test_killed import newest_checkpoint, published
from trainer.optimize import checkpoint
from trainer.policy.model import load_policy, named_weights
from trainer.serving.weights import weights_checksum

pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(1200)]


def followers(pids: set[int]) -> set[int]:
    """Return those that another of them has started."""
    return {pid for pid in pids if int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) in pids}


def test_a_run_goes_on_from_its_checkpoint_when_one_of_two_ranks_was_killed(ring: Ring) -> None:
    del ring.table["train"]["sft"]
    ring.table["train"]["processes"] = 2
    ring.endless()
    # So that a critic and a reference are kept by both ranks, too.
    ring.table["train"]["rl"] |= {"algorithm": "ppo", "options": {"kl": {"coefficient": 0.01}, "proximal": True}}
    ring.start()
    ring.wait_step(1)
    kill(wait_until(lambda: followers(ring.pids("train")), "the second rank"))
    wait_until(lambda: "train died" in ring.said(), "the end of the other rank")
    ring.wait_steps(1)
    summary = ring.end()
    assert summary["rollouts_failed"] == 0
    assert "resumed from" in (ring.run_dir / "logs" / "train.log").read_text(encoding="utf-8")
    # What was announced and pushed is what was checkpointed, and exported.
    stored = checkpoint.read(newest_checkpoint(ring))
    exported = dict(named_weights(load_policy(ring.run_dir / "checkpoint")))
    assert published(ring).checksum == weights_checksum(stored.weights) == weights_checksum(exported)
    assert stored.parts["critic"].updates == stored.updates > 1


def test_a_script_that_torchrun_starts_twice_trains_one_policy_and_returns_the_same(ring: Ring) -> None:
    (ring.cwd / "journey_algorithm.py").write_text(ALGORITHM, encoding="utf-8")
    each_its_own = SCRIPT.replace("print(", '__import__("pathlib").Path(__import__("os").environ["RANK"]).write_text(')
    (ring.cwd / "fit.py").write_text(each_its_own, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "fit.py", "null", ""],
        cwd=ring.cwd,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((ring.cwd / rank).read_text()) for rank in "01")
    check(first, ring.cwd)
    assert first == second
