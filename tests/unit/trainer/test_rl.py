"""The batch of a step: informative groups, refilled within a bound, with every drop counted; and the held-out score."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lightning_bus import ConfigError, CreditSection, Status, Submission
from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout, Group, RewardsSection, Row, ScoredRollout, scored
from tests.bus_fixtures import span
from tests.golden import multi_agent
from tests.reference.rows import tiny_llama
from trainer.algorithms import lines, rl
from trainer.algorithms.admission import submit_groups
from trainer.algorithms.batches import Batch, rows_and_advantages
from trainer.algorithms.chosen import algorithm_of
from trainer.algorithms.evaluate import evaluate
from trainer.config import EvalSection, PolicySection, RlSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.data.filters import drop_failed
from trainer.metrics import MetricsFile
from trainer.optimize import losses
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.phases import Phases
from trainer.session import Progress

pytestmark = pytest.mark.anyio

CREDIT = CreditSection()
CONFIG = RlSection(group_size=2, groups_per_step=2, refill_groups_max=3, staleness_max=1)


def finished(
    rollout_id: str,
    group: str,
    reward: float | None,
    *,
    version: int = 0,
    tokens: int = 2,
    temperature: float = 1.0,
    status: Status | None = None,
) -> FinishedRollout:
    attributes = {
        s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: s.pack_ids([1]), s.RESPONSE_IDS: s.pack_ids([2] * tokens),
        s.LOGPROBS: s.pack_logprobs([-1.0] * tokens), s.WEIGHT_VERSIONS: [[str(version), 0, tokens]],
        s.TEMPERATURE: temperature,
    }  # fmt: skip
    status = status or (Status.FAILED if reward is None else Status.SUCCEEDED)
    calls = [span("chat", rollout_id, 1, **attributes)]
    return FinishedRollout(rollout_id, group, {"phase": "train"}, status, 1, reward, "", calls, 0, 1)


def group(name: str, *rewards: float | None, **more: Any) -> Group:
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


def a_session(tmp_path: Path, config: RlSection = CONFIG, credit: CreditSection = CREDIT, **more: Any) -> Any:
    sections = {CreditSection: credit}
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    return SimpleNamespace(
        run=SimpleNamespace(section=lambda kind: sections.get(kind, kind()), run=SimpleNamespace(seed=0)),
        train=TrainSection(tasks="", held_out="", rl=config, eval=EvalSection(tasks=2)),
        policy=PolicySection(model=""),
        progress=Progress(**more),
        bus=StubBus(),
        directory=tmp_path,
        metrics=metrics,
        tell=metrics.write,
        note=lambda phase, **values: {"phase": phase, "step": 0, "version": 0, **values},
    )


async def batch_of(session: Any, stream: Any, tasks: list[str]) -> tuple[list[ScoredRollout], Any, Counter[str]]:
    algorithm = algorithm_of(session.train.rl, session.run.section(CreditSection))
    batch = await rl.next_batch(session, stream, tasks, algorithm, Phases())
    return batch.rollouts, batch.seen, batch.dropped


def rows_from(
    rollouts: list[ScoredRollout], credit: CreditSection, version: int, tokens_max: int, counts: Counter[str]
) -> list[Row]:
    return rows_and_advantages(
        Batch(rollouts, dropped=counts),
        algorithm_of(CONFIG, credit),
        version=version,
        staleness_max=CONFIG.staleness_max,
        tokens_max=tokens_max,
    )


async def test_groups_that_teach_nothing_are_replaced_before_the_batch_is_counted(tmp_path: Path) -> None:
    stream = StubStream([group("a", 1.0, 1.0), group("b", 0.0, 1.0), group("c", None, 1.0), group("d", 1.0, 0.0)])
    session = a_session(tmp_path)
    batch, seen, counts = await batch_of(session, stream, ["task"])
    assert [one.rollout_id for one in batch] == ["b-0", "b-1", "d-0", "d-1"]
    assert [one.group for one in seen] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert counts == Counter(zero_variance_group=2, failed=1, singleton_group=1)
    assert stream.asked == [2, 1, 1]
    assert session.progress.consumed_groups == 2, "what is trained on makes room only after the next version is out"


async def test_refilling_has_a_bound(tmp_path: Path) -> None:
    stream = StubStream([group(f"g{n}", 1.0, 1.0) for n in range(9)])
    session = a_session(tmp_path)
    batch, seen, counts = await batch_of(session, stream, ["task"])
    assert batch == []
    assert len(seen) == 2 * (CONFIG.groups_per_step + CONFIG.refill_groups_max)
    assert counts == Counter(zero_variance_group=len(seen))


async def test_what_versions_sampled_that_a_rollback_gave_up_is_replaced_and_does_not_count_against_the_bound(
    tmp_path: Path,
) -> None:
    old = [group(f"old{n}", 0.0, 1.0, version=n % 5) for n in range(2 * CONFIG.refill_groups_max + 6)]
    ended = [group(f"ended{n}", None, None, status=Status.CANCELLED) for n in range(CONFIG.refill_groups_max + 6)]
    stream = StubStream([*ended, *old, group("a", 0.0, 1.0, version=5), group("b", 1.0, 0.0, version=6)])
    session = a_session(tmp_path, version=6, rolled_back=5)
    batch, _, counts = await batch_of(session, stream, ["task"])
    assert [one.rollout_id for one in batch] == ["a-0", "a-1", "b-0", "b-1"]
    assert counts == Counter(rolled_back=2 * len(old), failed=2 * len(ended))
    assert session.progress.consumed_groups == len(old) + len(ended)


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


def told(rows: list[Row]) -> dict[str, list[float]]:
    """What the trained tokens of each rollout's rows carry, in order."""
    found: dict[str, list[float]] = {}
    for row in rows:
        assert row.advantages is not None
        found.setdefault(row.rollout_id, []).extend(row.advantages[row.trained].tolist())
    return found


def test_every_token_carries_its_rollouts_advantage() -> None:
    counts: Counter[str] = Counter()
    batch = rows_of(group("a", 0.0, 1.0), group("b", 3.0, 1.0))
    rows = rows_from(batch, CREDIT, 0, 100, counts)
    assert told(rows) == {"a-0": [-0.5] * 2, "a-1": [0.5] * 2, "b-0": [1.0] * 2, "b-1": [-1.0] * 2}
    assert not counts


def test_rows_leave_after_the_advantages_are_known_and_are_counted() -> None:
    counts: Counter[str] = Counter()
    batch = rows_of(
        group("old", 0.0, 1.0, version=2),
        group("long", 0.0, 1.0, version=3, tokens=50),
        group("greedy", 0.0, 1.0, version=3, temperature=0.0),
        group("a", 0.0, 1.0, version=3),
    )
    rows = rows_from(batch, CREDIT, 4, 20, counts)
    assert told(rows) == {"a-0": [-0.5] * 2, "a-1": [0.5] * 2}
    assert counts == Counter(stale=2, too_long=2, greedy=2)


def recorded() -> list[ScoredRollout]:
    """A real recording of several agents and turns, with what fails in it, and nothing but final rewards."""
    rollouts, _ = scored(multi_agent.load(), rewards=RewardsSection(emitted="final"))
    return drop_failed(rollouts).items


def test_by_default_learning_is_bit_for_bit_what_it_was_with_one_advantage_a_rollout() -> None:
    batch, counts = recorded(), Counter[str]()
    rows = rows_from(batch, CREDIT, 8, 1000, counts)
    # As it was: one number a rollout, the same on all its rows.
    reward_mean = {"count": 2 / 3, "join": 0.25}
    advantage_of = {one.rollout_id: np.float32((one.reward or 0) - reward_mean[one.group]) for one in batch}
    weights: list[list[torch.Tensor]] = []
    for advantages in (None, [advantage_of[row.rollout_id] for row in rows]):
        packs = pack_rows(rows, advantages, token_budget=60)
        model = tiny_llama(vocab_size=1000)
        optimizer = Optimizer(model, lr=1e-2)
        for _ in range(2):
            train_step(model, optimizer, packs, losses.cispo())
        weights.append([weight.detach().clone() for weight in model.parameters()])
    assert len(rows) == 13
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))


def test_credit_by_turn_reaches_the_tokens_of_each_call() -> None:
    credit = CreditSection(rule="turn", relevance=0.25, agents=["writer", "rewriter"])
    rollouts, _ = scored(multi_agent.load()[:2], credit, RewardsSection(emitted="final"))
    rows = rows_from(rollouts, credit, 8, 1000, Counter())
    # Writer then rewriter, three tokens each: a quarter of the outcome for the first, the whole for the last.
    assert told(rows) == {"count-0": [0.125] * 3 + [0.5] * 3, "count-1": [-0.125] * 3 + [-0.5] * 3}


def test_rows_of_another_policy_are_not_ours_to_train() -> None:
    credit = CreditSection(agents={"writer": "policy", "checker": "fixed"})
    rollouts, dropped = scored(multi_agent.load(), credit, policy="policy")
    assert {row.policy for one in rollouts for row in one.rows} == {"policy"}
    assert (dropped["other policy"], dropped["other agent"]) == (6, 5)


async def test_with_a_curriculum_tasks_follow_what_was_learnt_of_them_also_after_a_restart(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, groups_per_step=1, refill_groups_max=7, curriculum=True, explore=0.0)
    labels = [{"phase": "train", "task_number": str(task)} for task in range(3)]
    solved = {"0": (1.0, 1.0), "1": (0.0, 1.0), "2": (0.0, 0.0)}

    def told(task: str, name: str) -> Group:
        members = group(name, *solved[task]).rollouts
        return Group(name, tuple(replace(one, labels=labels[int(task)]) for one in members))

    session = a_session(tmp_path, config)
    stream = StubStream([told("0", "a"), told("2", "b"), told("1", "c")])
    await batch_of(session, stream, ["x", "y", "z"])
    assert session.progress.curriculum == {"0": [1.0, 1.0], "2": [0.0, 1.0], "1": [0.5, 1.0]}
    restored = msgspec.convert(msgspec.to_builtins(session.progress), Progress)
    restarted = a_session(tmp_path, config)
    restarted.progress = restored
    for one in (session, restarted):
        before = len(one.bus.submitted)
        await submit_groups(one, ["x", "y", "z"], 4)
        assert {each.labels["task_number"] for each in one.bus.submitted[before:]} == {"1"}, (
            "the one that can be learnt from"
        )
    assert session.bus.submitted[-8:] == restarted.bus.submitted[-8:]


async def test_agents_that_nobody_has_end_the_run_with_who_there_was(tmp_path: Path) -> None:
    stream = StubStream([group(f"g{n}", 0.0, 1.0) for n in range(5)])
    session = a_session(tmp_path, credit=CreditSection(agents=["wrter"]))
    with pytest.raises(ConfigError, match="'wrter'.*selects none"):
        await batch_of(session, stream, ["task"])


async def test_an_agent_that_is_seldom_needed_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = StubStream([group(f"g{n}", 0.0, 1.0) for n in range(5)])
    session = a_session(tmp_path, credit=CreditSection(agents=["rewriter"]), step=3)
    batch, _, counts = await batch_of(session, stream, ["task"])
    assert batch == []
    assert counts == {"no agent named": 10, "nothing_to_train": 10}, "they make room for groups that do need it"
    assert "selects none of the calls" in caplog.text


def test_rewards_that_an_estimator_cannot_take_are_told(tmp_path: Path) -> None:
    credit = CreditSection(estimator="maxrl")
    with pytest.raises(ConfigError, match="reward -1 is negative"):
        rows_from(rows_of(group("a", -1.0, 1.0)), credit, 0, 100, Counter())


def test_credit_by_a_critic_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="needs a critic"):
        algorithm_of(CONFIG, CreditSection(rule="value"))


async def test_compared_with_the_batch_a_group_that_agrees_does_teach(tmp_path: Path) -> None:
    stream = StubStream([group("a", 1.0, 1.0), group("b", 0.0, 0.0)])
    session = a_session(tmp_path, credit=CreditSection(estimator="reinforce++"))
    batch, _, counts = await batch_of(session, stream, ["task"])
    rows = rows_from(batch, CreditSection(estimator="reinforce++"), 0, 100, counts)
    assert {name: round(values[0], 3) for name, values in told(rows).items()} == {
        "a-0": 1.0, "a-1": 1.0, "b-0": -1.0, "b-1": -1.0,
    }  # fmt: skip


def test_what_merging_saved_is_in_the_metrics() -> None:
    assert lines.merging(recorded()) == {"rows_per_rollout": 13 / 5, "tokens_saved": 25}


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
    session.model, session.restore_optimizer = tiny_llama(), lambda optimizer, parts: None
    with pytest.raises(NextStep):
        await rl.reinforce(session, StubStream(), ["task"], ["held out"], algorithm_of(CONFIG, CREDIT))  # pyright: ignore[reportArgumentType]
    assert done == ["evaluated 7"]
