"""Training from Python, and with an algorithm of one's own: real processes, a real ring, a policy that learns a little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.journeys.ring import LIMIT_S, Ring, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ALGORITHM = """
from trainer import Algorithm


class Mine(Algorithm):
    def advantages(self, batch):
        return [rollout.total - 0.5 for rollout in batch]

    def loss(self, inputs):
        return -inputs.advantages_K * inputs.logprobs_K, {"earned": inputs.advantages_K.sum()}
"""

# The agent and the algorithm are of __main__: no other process can import them.
SCRIPT = """
import json
import sys

from journey_agent import agent as asked
from journey_algorithm import Mine
from trainer import Trainer

TASKS = [{"question": f"Say {n}."} for n in range(40)]
SETTINGS = {"broker.keys": sys.argv[2], "train.rl.steps_max": 2, "train.rl.group_size": 4, "train.rl.groups_per_step": 2, "train.eval.tasks": 4}


async def agent(task, base_url, api_key):
    import anyio.to_thread

    return await anyio.to_thread.run_sync(lambda: asked(task, base_url=base_url, api_key=api_key))


class Ours(Mine):
    pass


def main(where):
    trainer = Trainer(algorithm=Ours(), policy="examples.calc.policy:build", name="ours", settings=SETTINGS)
    result = trainer.fit(agent if where is None else None, TASKS, TASKS[:4], **(where or {}))
    print(json.dumps([result.rewards, result.evals, str(result.checkpoint), result.lines("rl")]))


main(json.loads(sys.argv[1]))
"""


def script(ring: Ring, where: Any = None, keys: str = "") -> Any:
    """Run the script in the ring's directory and return what it printed last."""
    (ring.cwd / "journey_algorithm.py").write_text(ALGORITHM, encoding="utf-8")
    (ring.cwd / "fit.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "fit.py", json.dumps(where), keys], cwd=ring.cwd, capture_output=True, text=True, timeout=2 * LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(made: Any, cwd: Path) -> None:
    rewards, evals, checkpoint, lines = made
    assert len(rewards) == len(lines) == 2
    assert evals.keys() == {"0", "2"}
    assert (cwd / checkpoint / "model.safetensors").exists()
    assert all("earned" in line and line["idle_share"] <= 1.0 for line in lines), "it is our algorithm that learnt"


def test_a_class_of_two_methods_trains_on_policy_from_a_run_file(ring: Ring) -> None:
    (ring.cwd / "journey_algorithm.py").write_text(ALGORITHM, encoding="utf-8")
    ring.table["train"]["rl"] |= {"algorithm": "journey_algorithm:Mine", "staleness_max": 0}
    ring.start()
    assert ring.wait() == 0, ring.said()
    ring.assert_complete(steps=3)
    lines = ring.metrics("rl")
    assert all("earned" in line for line in lines)
    assert [(line["staleness_max"], line["dropped"].get("stale", 0)) for line in lines] == [(0, 0)] * 3
    waits = {"wait_rollouts_s", "wait_version_s", "checkpoint_s", "publish_s", "push_s", "step_s", "iteration_s"}
    assert all(waits <= line.keys() for line in lines)


def test_an_agent_and_an_algorithm_of_a_script_train_from_python(ring: Ring) -> None:
    check(script(ring, keys="auto"), ring.cwd)
    wait_until(lambda: not ring._processes(), "the end of what was started")
    assert (ring.cwd / "runs" / "ours" / "run.toml").exists()


def test_a_trainer_joins_what_runs_elsewhere(ring: Ring) -> None:
    del ring.table["train"]["sft"]
    ring.start(str(ring.write()), "--no-trainer")
    wait_until(lambda: "gateway is up" in ring.said() and "serve is up" in ring.said(), "the ring without its trainer")
    engines = ring.table["gateway"]["upstreams"]
    check(script(ring, {"backend": ring.bus, "engines": engines}), ring.cwd)
