"""One loop for all algorithms: what it asks of them and when, what on-policy means, where its time goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_bus.adapters import Row, ScoredRollout
from tests.reference.rows import tiny_llama
from tests.unit.trainer.test_algorithms import Half
from tests.unit.trainer.test_rl import CREDIT, StubBus, a_session, finished, rows_of
from tests.unit.trainer.test_rl import group as a_group
from trainer.algorithms import rl
from trainer.algorithms.base import Algorithm
from trainer.algorithms.batches import Batch
from trainer.algorithms.chosen import algorithm_of
from trainer.algorithms.policy_gradients import CISPO
from trainer.config import RlSection
from trainer.data.batch import pack_rows
from trainer.optimize import losses
from trainer.optimize.losses import LossInputs, LossOutputs
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.phases import Phases

pytestmark = pytest.mark.anyio


def agrees(group: str) -> bool:
    """Two of four groups agree: they teach nothing and are replaced, though of two in one step only one may be."""
    return int(group[-5:]) % 4 >= 2


class World(StubBus):
    """A bus whose rollouts end at once, sampled by the version that is out when they are submitted."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Any = None
        self.groups: deque[Any] = deque()
        self.waited: list[int] = []

    async def submit(self, rollouts: list[Any]) -> int:
        await super().submit(rollouts)
        for start in range(0, len(rollouts), 2):
            name = rollouts[start].group
            rewards = (1.0, 1.0) if agrees(name) else (0.0, 1.0)
            version = self.session.out
            self.groups.append(
                SimpleNamespace(
                    rollouts=tuple(
                        finished(f"{name}-{at}", name, reward, version=version) for at, reward in enumerate(rewards)
                    )
                )
            )
        return len(rollouts)

    async def next_groups(self, count: int) -> list[Any]:
        assert len(self.groups) >= count, "the trainer waits for rollouts that nobody was asked for"
        return [self.groups.popleft() for _ in range(count)]

    async def wait_version_called(self, version: int) -> None:
        self.waited.append(version)

    async def commit(self, state: dict[str, Any]) -> None: ...

    def saved_state(self) -> dict[str, Any]:
        return {}


class Watched(Half):
    """Records what the loop asks of it, in order."""

    def __init__(self, warmup: int = 0) -> None:
        self.asked: list[str] = []
        self.versions: list[set[int]] = []
        self.warmup = warmup

    @property
    def policy_waits(self) -> bool:
        return self.asked.count("learn") < self.warmup

    def informative(self, rollouts: Any) -> Any:
        return CISPO().informative(rollouts)

    def prepare(self, setting: Any) -> None:
        self.asked.append("prepare")

    def parts(self) -> Mapping[str, Any]:
        self.asked.append("parts")
        return {}

    def advantages(self, batch: Sequence[ScoredRollout]) -> list[float]:
        self.asked.append("advantages")
        return super().advantages(batch)

    def learn(self, rows: Sequence[Row]) -> Mapping[str, float]:
        self.asked.append("learn")
        self.versions.append({row.version_oldest for row in rows})
        return {"mine": 1.0}

    def loss(self, inputs: LossInputs) -> LossOutputs:
        self.asked.append("loss")
        return super().loss(inputs)


def a_world(tmp_path: Path, algorithm: Algorithm, **config: Any) -> tuple[Any, World]:
    section = RlSection(**{"group_size": 2, "groups_per_step": 2, "refill_groups_max": 1, "steps_max": 5, **config})
    session, world = a_session(tmp_path, section), World()
    session.bus = world
    world.session = session
    session.model, session.out, session.line = tiny_llama(vocab_size=64), 0, []
    session.restore_optimizer = lambda optimizer, parts: None
    session.checkpoint = lambda optimizer, parts: None

    async def publish() -> None:
        session.out = session.progress.version

    async def retain() -> None: ...

    session.publish, session.retain, session.tell = publish, retain, session.line.append
    return session, world


def test_by_default_a_step_is_bit_for_bit_one_of_cispo_on_centred_rewards(tmp_path: Path) -> None:
    batch = Batch(rows_of(a_group("a", 0.0, 1.0), a_group("b", 0.0, 1.0, tokens=5)))
    session, _ = a_world(tmp_path, Half())
    learner = rl.Learner(session, algorithm_of(session.train.rl, CREDIT))
    rows = learner.rows(batch, Phases())
    assert learner.learn(rows, Phases()).policy
    theirs = tiny_llama(vocab_size=64)
    packs = pack_rows(rows, [0.5 if one.rollout_id.endswith("1") else -0.5 for one in rows], token_budget=2048)
    train_step(theirs, Optimizer(theirs, lr=session.train.rl.lr), packs, losses.cispo())
    ours = session.model.parameters()
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs.parameters(), strict=True))


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_no_rollout_is_trained_on_that_is_older_than_the_bound(tmp_path: Path, staleness: int) -> None:
    algorithm = Watched()
    session, world = a_world(tmp_path, algorithm, staleness_max=staleness, steps_max=8)
    await rl.reinforce(session, world, ["task"], [], algorithm)  # pyright: ignore[reportArgumentType]
    behind = [at - min(versions) for at, versions in enumerate(algorithm.versions)]
    assert max(behind) <= staleness
    assert max(behind) > 0 or not staleness, "rollouts did run ahead"
    assert all("stale" not in line["dropped"] for line in session.line), "what is dropped was carried out in vain"
    # accepted + running ≤ (η + version + 1) · B, where groups that taught nothing are neither
    agreed = sum(agrees(one.group) for one in world.submitted) // 2
    assert session.progress.submitted_groups <= (staleness + session.progress.version + 1) * 2 + agreed


async def test_on_policy_no_rollout_begins_before_the_weights_that_it_improves(tmp_path: Path) -> None:
    algorithm = Watched()
    session, world = a_world(tmp_path, algorithm, staleness_max=0, steps_max=8)
    await rl.reinforce(session, world, ["task"], [], algorithm)  # pyright: ignore[reportArgumentType]
    assert algorithm.versions == [{at} for at in range(8)]
    assert not world.groups, "and none was begun that no step took"


async def test_the_loop_asks_an_algorithm_in_the_order_that_is_promised(tmp_path: Path) -> None:
    algorithm = Watched(warmup=2)
    session, world = a_world(tmp_path, algorithm, steps_max=4, staleness_max=2)
    await rl.reinforce(session, world, ["task"], [], algorithm)  # pyright: ignore[reportArgumentType]
    assert algorithm.asked == ["prepare", "parts", *["advantages", "learn"] * 2, *["advantages", "learn", "loss"] * 2]
    assert session.progress.version == 2, "while a critic warms up the policy stays"
    assert world.waited == [0, 1]
    assert all(line["mine"] == 1.0 for line in session.line)
    assert ["loss" in line for line in session.line] == [False, False, True, True]


async def test_a_steps_line_says_where_its_time_went(tmp_path: Path) -> None:
    session, world = a_world(tmp_path, Half(), steps_max=1)
    await rl.reinforce(session, world, ["task"], [], Half())  # pyright: ignore[reportArgumentType]
    (line,) = session.line
    names = ("wait_rollouts_s", "wait_version_s", "advantages_s", "step_s", "checkpoint_s", "publish_s", "iteration_s")
    assert all(line[name] >= 0 for name in names)
    assert sum(line[name] for name in names[:-1]) <= line["iteration_s"]


def test_idle_is_what_was_spent_waiting() -> None:
    clock = iter([0.0, 1.0, 4.0, 4.0, 5.0, 5.0, 7.0, 10.0]).__next__
    phases = Phases(clock)
    for name in ("wait_rollouts_s", "step_s", "wait_version_s"):
        with phases.timed(name):
            pass
    expected = {"wait_rollouts_s": 3.0, "step_s": 1.0, "wait_version_s": 2.0, "iteration_s": 10.0, "idle_share": 0.5}
    assert phases.line() == expected
