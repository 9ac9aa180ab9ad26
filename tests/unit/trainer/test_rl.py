"""The batch of a step: informative groups, refilled within a bound, with every drop counted; and the held-out score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from lightning_bus import Status, Submission
from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout
from tests.bus_fixtures import span
from tests.reference.rows import tiny_llama
from trainer.algorithms import rl
from trainer.algorithms.evaluate import evaluate
from trainer.config import EvalSection, PolicySection, RlSection, TrainSection
from trainer.data.filters import ScoredRollout
from trainer.data.stream import Group, scored
from trainer.metrics import MetricsFile
from trainer.session import Progress

pytestmark = pytest.mark.anyio

CONFIG = RlSection(group_size=2, groups_per_step=2, refill_groups_max=3, staleness_max=1)


def finished(
    rollout_id: str, group: str, reward: float | None, *, version: int = 0, tokens: int = 2
) -> FinishedRollout:
    attributes = {
        s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: s.pack_ids([1]), s.RESPONSE_IDS: s.pack_ids([2] * tokens),
        s.LOGPROBS: s.pack_logprobs([-1.0] * tokens), s.WEIGHT_VERSIONS: [[str(version), 0, tokens]], s.TEMPERATURE: 1.0,
    }  # fmt: skip
    status = Status.FAILED if reward is None else Status.SUCCEEDED
    calls = [span("chat", rollout_id, 1, **attributes)]
    return FinishedRollout(rollout_id, group, {"phase": "train"}, status, 1, reward, "", calls, 0, 1)


def group(name: str, *rewards: float | None, **more: int) -> Group:
    return Group(name, tuple(finished(f"{name}-{n}", name, reward, **more) for n, reward in enumerate(rewards)))


class StubBus:
    """Takes submissions."""

    def __init__(self) -> None:
        self.submitted: list[Submission] = []

    async def submit(self, rollouts: list[Submission]) -> int:
        self.submitted += rollouts
        return len(rollouts)


class StubStream:
    """Hands out groups, and ended rollouts, that the test made."""

    def __init__(self, groups: list[Group] | None = None) -> None:
        self.groups = groups or []
        self.asked: list[int] = []

    async def next_groups(self, count: int) -> list[Group]:
        self.asked.append(count)
        taken, self.groups = self.groups[:count], self.groups[count:]
        assert len(taken) == count, "asked for more than is on its way"
        return taken


def a_session(tmp_path: Path, config: RlSection = CONFIG, **more: Any) -> Any:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    return SimpleNamespace(
        train=TrainSection(tasks="", held_out="", rl=config, eval=EvalSection(tasks=2)),
        policy=PolicySection(model=""),
        progress=Progress(**more),
        bus=StubBus(),
        directory=tmp_path,
        metrics=metrics,
        tell=metrics.write,
        note=lambda phase, **values: {"phase": phase, "step": 0, "version": 0, **values},
    )


async def test_groups_that_teach_nothing_are_replaced_before_the_batch_is_counted(tmp_path: Path) -> None:
    stream = StubStream([group("a", 1.0, 1.0), group("b", 0.0, 1.0), group("c", None, 1.0), group("d", 1.0, 0.0)])
    session = a_session(tmp_path)
    batch, seen, counts = await rl.next_batch(session, stream, ["task"])  # pyright: ignore[reportArgumentType]
    assert [one.rollout_id for one in batch] == ["b-0", "b-1", "d-0", "d-1"]
    assert [one.group for one in seen] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert counts == Counter(zero_variance_group=2, failed=1, singleton_group=1)
    assert stream.asked == [2, 1, 1]
    assert session.progress.consumed_groups == 2, "what is trained on makes room only after the next version is out"


async def test_refilling_has_a_bound(tmp_path: Path) -> None:
    stream = StubStream([group(f"g{n}", 1.0, 1.0) for n in range(9)])
    session = a_session(tmp_path)
    batch, seen, counts = await rl.next_batch(session, stream, ["task"])  # pyright: ignore[reportArgumentType]
    assert batch == []
    assert len(seen) == 2 * (CONFIG.groups_per_step + CONFIG.refill_groups_max)
    assert counts == Counter(zero_variance_group=len(seen))


async def test_rollouts_run_ahead_as_far_as_staleness_allows_and_no_further(tmp_path: Path) -> None:
    session = a_session(tmp_path, submitted_groups=5, consumed_groups=4)
    await rl.keep_running_ahead(session, ["a", "b"])
    assert session.progress.submitted_groups == 4 + 2 * CONFIG.groups_per_step
    assert [one.rollout_id for one in session.bus.submitted[:3]] == ["train-00005-0", "train-00005-1", "train-00006-0"]
    assert {one.group for one in session.bus.submitted} == {f"train-{n:05d}" for n in (5, 6, 7)}
    again = a_session(tmp_path, submitted_groups=5, consumed_groups=4)
    await rl.keep_running_ahead(again, ["a", "b"])
    assert again.bus.submitted == session.bus.submitted, "a resumed trainer submits the very same ones"
    await rl.keep_running_ahead(session, ["a", "b"])
    assert len(session.bus.submitted) == 3 * CONFIG.group_size


def rows_of(*groups: Group) -> list[ScoredRollout]:
    rollouts, dropped = scored([rollout for one in groups for rollout in one.rollouts])
    assert not dropped
    return rollouts


def test_every_row_carries_its_rollouts_advantage() -> None:
    counts: Counter[str] = Counter()
    batch = rows_of(group("a", 0.0, 1.0), group("b", 3.0, 1.0))
    rows, advantages = rl.rows_and_advantages(batch, CONFIG, 0, 100, counts)
    assert dict(zip([row.rollout_id for row in rows], advantages, strict=True)) == {
        "a-0": -0.5, "a-1": 0.5, "b-0": 1.0, "b-1": -1.0,
    }  # fmt: skip
    assert not counts


def test_rows_leave_after_the_advantages_are_known_and_are_counted() -> None:
    counts: Counter[str] = Counter()
    batch = rows_of(
        group("old", 0.0, 1.0, version=2),
        group("long", 0.0, 1.0, version=3, tokens=50),
        group("a", 0.0, 1.0, version=3),
    )
    rows, advantages = rl.rows_and_advantages(batch, CONFIG, 4, 20, counts)
    assert [row.rollout_id for row in rows] == ["a-0", "a-1"]
    assert np.allclose(advantages, [-0.5, 0.5])
    assert counts == Counter(stale=2, too_long=2)


class StubEnded(StubStream):
    """Ends every rollout with the given rewards."""

    def __init__(self, *rewards: float | None) -> None:
        super().__init__()
        self.rewards = rewards
        self.asked_for: list[str] = []

    async def carry_out(self, submissions: list[Submission], run_dir: Path) -> list[FinishedRollout]:
        self.asked_for += [one.rollout_id for one in submissions]
        return [finished(one.rollout_id, one.group, r) for one, r in zip(submissions, self.rewards, strict=True)]


async def test_a_version_is_evaluated_once_and_a_failure_is_no_success(tmp_path: Path) -> None:
    session, stream = a_session(tmp_path, version=3), StubEnded(1.0, None)
    for _ in range(2):
        assert await evaluate(session, stream, ["a", "b", "c"]) == 0.5  # pyright: ignore[reportArgumentType]
    assert stream.asked_for == ["eval-v3-0000", "eval-v3-0001"]
    (line,) = session.metrics.lines()
    assert (line["held_out_success"], line["rollouts"], line["failed"]) == (0.5, 2, 1)
    assert session.progress.evals == {"3": 0.5}


async def test_an_evaluation_that_a_killed_trainer_owed_is_done_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NextStep(Exception):
        pass

    done: list[str] = []

    async def evaluated(session: Any, *_: Any) -> None:
        done.append(f"evaluated {session.progress.version}")

    async def next_batch(*_: Any) -> None:
        raise NextStep

    monkeypatch.setattr(rl, "evaluate", evaluated)
    monkeypatch.setattr(rl, "next_batch", next_batch)
    session = a_session(tmp_path, step=2, version=7)
    session.train = msgspec.structs.replace(session.train, eval=EvalSection(every_steps=2))
    session.model, session.restore_optimizer = tiny_llama(), lambda optimizer: None
    with pytest.raises(NextStep):
        await rl.reinforce(session, StubStream(), ["task"], ["held out"])  # pyright: ignore[reportArgumentType]
    assert done == ["evaluated 7"]
