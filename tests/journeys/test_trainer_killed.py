"""SIGKILL for a trainer at twenty moments, and two ranks: the same as the run of one process that nobody disturbed.

Half of the moments are random, half lie inside the writing of a checkpoint, which then is torn or without its name.
PPO, whose critic has weights, an optimiser and a warm-up of its own, is killed at moments that are named. The log is
recorded beforehand, so whatever differs was caused by the kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from lightning_bus import Status
from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout
from tests.bus_fixtures import span
from tests.recorded_run import write_run
from tests.reference.rows import VOCABULARY, tiny_llama
from trainer.optimize import checkpoint

STEPS, KILLS, GROUPS = 110, 20, 490
STEPS_OF_A_LIFE_MAX = 3  # and one or two more until the kill: twenty lives stay within the run
ROOT = Path(__file__).parents[2]
RUN_TOML = f"""
[run]
name = "killed"
seed = 3

[policy]
model = "nothing"

[train]
tasks = "none"
held_out = "none"
token_budget = 48
follow = true
rollout_limit_s = 20.0
keep_checkpoints = 3

[train.rl]
steps_max = {STEPS}
group_size = 2
groups_per_step = 2
refill_groups_max = 2
staleness_max = 1000000
lr = 3e-3
warmup_updates = 5
"""

PPO_STEPS, WARM_UP, CRITIC_EPOCHS, MINIBATCHES = 14, 4, 2, 2
PPO_TOML = f"""{RUN_TOML.replace(f"steps_max = {STEPS}", f"steps_max = {PPO_STEPS}")}
algorithm = "ppo"

[train.rl.options]
critic_lr = 3e-3
critic_warmup_steps = {WARM_UP}
critic_epochs = {CRITIC_EPOCHS}
minibatches = {MINIBATCHES}
"""
# When and at which checkpoint: within the critic's warm-up, at its end, and when both learn.
MOMENTS = [("inside", 2), ("after", WARM_UP), ("before", WARM_UP + 1), ("inside", 9), ("before", 12)]

pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(1800)]


def a_rollout(rng: np.random.Generator, group: int, member: int) -> FinishedRollout:
    """A rollout of one or two calls, the second of which goes on from the first."""
    rollout_id, calls = f"train-{group:05d}-{member}", []
    prompt = rng.integers(0, VOCABULARY, 3).tolist()
    for _ in range(int(rng.integers(1, 3))):
        response = rng.integers(0, VOCABULARY, int(rng.integers(2, 7))).tolist()
        attributes = {
            s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: s.pack_ids(prompt), s.RESPONSE_IDS: s.pack_ids(response),
            s.LOGPROBS: s.pack_logprobs((-rng.exponential(1.0, len(response))).tolist()), s.TEMPERATURE: 1.0,
            s.WEIGHT_VERSIONS: [["0", 0, len(response)]], s.REQUEST_MODEL: "policy",
        }  # fmt: skip
        calls.append(span("chat", rollout_id, 1, **attributes))
        prompt = prompt + response + rng.integers(0, VOCABULARY, 2).tolist()
    reward = 1.0 if group % 7 == 0 else float(rng.integers(0, 3)) / 2  # every seventh group agrees, and is replaced
    labels = {"phase": "train"}
    return FinishedRollout(rollout_id, f"train-{group:05d}", labels, Status.SUCCEEDED, 1, reward, "", calls, 0, 1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory before its trainer began."""
    directory = tmp_path_factory.mktemp("recorded") / "run"
    rng = np.random.default_rng(11)
    write_run(directory, [a_rollout(rng, group, member) for group in range(GROUPS) for member in range(2)])
    tiny_llama(1).save_pretrained(directory / "policy")
    (directory / "run.toml").write_text(RUN_TOML, encoding="utf-8")
    (directory / "secret").write_bytes(bytes(32))  # so that the run is taken to be where it lies
    return directory


class Lives:
    """Trainers of one run directory, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.journeys.recorded_trainer", str(directory)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def begin(self, death: str = "live") -> int:
        """Begin a life, which ends by itself as `recorded_trainer` understands it, and return its process id."""
        print(death, file=self._parent.stdin, flush=True)
        return self._said()

    def end(self) -> int:
        """Wait until the life is over and return its exit status."""
        return self._said()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._parent.kill()
        self._parent.communicate()

    def _said(self) -> int:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line, "the trainer's parent died"
        return int(line)


def newest(directory: Path) -> int:
    """The number of the newest checkpoint; 0 before the first."""
    names = (path.stem.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*.safetensors"))
    return max(map(int, names), default=0)


def kill_at(lives: Lives, moment: random.Random, *, inside_a_write: bool) -> bool:
    """Begin a life and kill it some steps later, or while it starts. False when it was done before that.

    Counted in steps, so that the kills lie all over the run on a machine of any speed.
    """
    target = newest(lives.directory) + moment.randint(0, STEPS_OF_A_LIFE_MAX)
    if inside_a_write:
        lives.begin(f"{moment.choice(('torn', 'inside'))} {target + 1}")
        return lives.end() == -signal.SIGKILL
    child = lives.begin(f"before {target + 2}")  # should this process be kept from looking for so long
    # Another process is watched, so there is nothing to wait on but the disk, and for what lies between, the clock.
    while newest(lives.directory) < target and Path(f"/proc/{child}").exists():
        time.sleep(0.0002)
    time.sleep(moment.uniform(0.0, 0.05))
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return lives.end() == -signal.SIGKILL


def said(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("_s", "idle_share", "_bytes", "mfu")
    return [{key: value for key, value in line.items() if not key.endswith(timed)} for line in lines]


def batches(directory: Path) -> dict[int, Any]:
    """What each version learnt from; whoever repeats one must say the same."""
    found: dict[int, Any] = {}
    for text in (directory / "batches.jsonl").read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a kill cut it short
            line = json.loads(text)
            assert found.setdefault(line["version"], line["trained"]) == line["trained"]
    return found


def test_a_trainer_killed_twenty_times_learns_what_an_unbroken_one_does(recorded: Path, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for directory in (unbroken, killed):
        shutil.copytree(recorded, directory)
    with Lives(unbroken) as lives:
        lives.begin()
        assert lives.end() == 0
    expected = said(unbroken)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert len({line.get("loss") for line in expected}) > STEPS // 2, "a run that learns nothing would prove nothing"

    moment, reached = random.Random(20), set[int]()
    with Lives(killed) as lives:
        for number in range(KILLS):
            assert kill_at(lives, moment, inside_a_write=number % 2 == 1), number
            reached.add(newest(killed))
        assert len(reached) > KILLS // 2, "the kills lay close together"
        lives.begin()
        assert lives.end() == 0
    assert_same(killed, unbroken)


def test_a_killed_ppo_trainer_goes_on_with_its_critic(recorded: Path, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for directory in (unbroken, killed):
        shutil.copytree(recorded, directory)
        (directory / "run.toml").write_text(PPO_TOML, encoding="utf-8")
    with Lives(unbroken) as lives:
        lives.begin()
        assert lives.end() == 0
    with Lives(killed) as lives:
        for moment, number in MOMENTS:
            lives.begin(f"{moment} {number}")
            assert lives.end() == -signal.SIGKILL, (moment, number)
            assert newest(killed) == (number if moment == "after" else number - 1)
        lives.begin()
        assert lives.end() == 0
    whole = assert_same(killed, unbroken)
    critic = whole.parts["critic"]
    assert whole.updates == (PPO_STEPS - WARM_UP) * MINIBATCHES
    assert (int(critic.weights["steps"]), critic.updates) == (PPO_STEPS, PPO_STEPS * CRITIC_EPOCHS * MINIBATCHES)
    assert len({line["value_loss"] for line in said(killed)}) == PPO_STEPS, (
        "a critic that learns nothing proves nothing"
    )


def assert_same(killed: Path, unbroken: Path) -> checkpoint.Stored:
    """Check that two runs are the same to the bit, and return what both ended with."""
    assert said(killed) == said(unbroken)
    assert batches(killed) == batches(unbroken)
    ours, theirs = (checkpoint.latest(one / "checkpoints") for one in (killed, unbroken))
    assert ours is not None and theirs is not None and ours.name == theirs.name
    mine, other = checkpoint.read(ours), checkpoint.read(theirs)
    assert (mine.updates, mine.skipped, mine.parts.keys()) == (other.updates, other.skipped, other.parts.keys())
    for one, another in [(mine, other), *((mine.parts[name], other.parts[name]) for name in mine.parts)]:
        assert (one.updates, one.skipped) == (another.updates, another.skipped)
        for left, right in ((one.weights, another.weights), (one.moments, another.moments)):
            assert left.keys() == right.keys() and left
            assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    return mine


def test_two_ranks_under_torchrun_learn_what_one_process_does(recorded: Path, tmp_path: Path) -> None:
    steps = 12
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        shutil.copytree(recorded, tmp_path / name)
        toml = RUN_TOML.replace(f"steps_max = {STEPS}", f"steps_max = {steps}")
        (tmp_path / name / "run.toml").write_text(toml, encoding="utf-8")
        ended = subprocess.run(
            [*launcher, "-m", "tests.journeys.recorded_trainer", str(tmp_path / name), "once"],
            cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    one, two = said(tmp_path / "one"), said(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, steps + 1))
    assert batches(tmp_path / "two") == batches(tmp_path / "one")
    for ours, theirs in zip(two, one, strict=True):
        assert ours["trained_tokens"] == theirs["trained_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
