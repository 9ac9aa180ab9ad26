"""A run whose rewards a hook says: what the trainer's stream hands out, and what RUN.toml may hold about it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import tomli_w

from lightning_bus import REWARD, HookPool, Record, Span
from lightning_bus.adapters import Cursor, FinishedRollout, RewardsSection, RuleSection, scored
from lightning_bus.config import load, to_toml_table
from lightning_bus.daemon import sections
from lightning_bus.errors import ConfigError
from lightning_bus.lifecycle import Status
from lightning_bus.log.reader import LogReader
from tests.recorded_agent import Play
from tests.recorded_run import write_run
from trainer.algorithms.lines import reward_shares
from trainer.data.stream import EVAL, TRAIN, RolloutStream

pytestmark = pytest.mark.skipif(os.name == "nt", reason="hook processes need process groups")

HOOK = """
def reward(rollout):
    if rollout.task["right"] is None:
        raise ValueError("cannot judge")
    return rollout.task["right"]
"""


class Log:
    """A log that has been read to its end. Stands for the bus."""

    session = "trainer"

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.appended: list[Span] = []

    async def fetch(self, offset: int, *, bytes_max: int) -> tuple[list[Record], int, int]:
        return [], offset, len(self.records)

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        self.appended += spans

    async def follow(self, offset: int) -> AsyncIterator[Record]:
        for record in self.records[offset:]:
            yield record
        await anyio.sleep_forever()


def ended(rollout_id: str, phase: str, status: Status = Status.SUCCEEDED) -> FinishedRollout:
    play = Play(rollout_id=rollout_id, group="g")
    play.say("done")
    return FinishedRollout(
        rollout_id, "g", {"phase": phase}, status, 1, 0.25 if status is Status.SUCCEEDED else None, "", play.spans, 0, 1
    )


def test_a_hook_judges_what_is_trained_on_and_what_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stream_hooks.py").write_text(HOOK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rollouts = [ended("a", TRAIN), ended("b", TRAIN), ended("c", TRAIN, Status.FAILED), ended("e", EVAL)]
    tasks = {"a": {"right": 1.0}, "b": {"right": None}, "c": {"right": 1.0}, "e": {"right": 0.5}}
    write_run(tmp_path / "run", rollouts, tasks=tasks)
    with LogReader(tmp_path / "run" / "log") as reader:
        bus: Any = Log(list(reader.records()))

    async def follow() -> tuple[list[FinishedRollout], FinishedRollout]:
        async with HookPool("stream_hooks:reward") as hooks, anyio.create_task_group() as background:
            stream = RolloutStream(bus, 3, Cursor(), 20.0, hooks=hooks)
            background.start_soon(stream.run)
            (group,) = await stream.next_groups(1)
            (evaluated,) = await stream.wait_ended(["e"])
            background.cancel_scope.cancel()
        return list(group.rollouts), evaluated

    trained, evaluated = anyio.run(follow)
    assert [(rollout.reward, rollout.not_judged) for rollout in trained] == [
        (1.0, ""), (None, "hook raised ValueError"), (None, ""),
    ]  # fmt: skip
    assert evaluated.reward == 0.5
    assert [(one.rollout_id, one.attributes[REWARD]) for one in bus.appended] == [("a", 1.0), ("e", 0.5)]
    made, dropped = scored(
        trained, rewards=RewardsSection(rules=[RuleSection(on="format_ok", value=0.5, pattern="done")])
    )
    assert [one.reward for one in made] == [1.0, None, None]
    assert dropped == {"hook raised ValueError": 1}
    assert made[0].episode is not None
    assert made[0].episode.total == 1.5


def test_the_metrics_tell_where_returns_came_from() -> None:
    rules = RewardsSection(rules=[RuleSection(on="format_ok", value=0.75, pattern="done")])
    made, _ = scored([ended("a", TRAIN), ended("c", TRAIN, Status.FAILED)], rewards=rules)
    assert reward_shares(made) == {"reward_shares": {"format_ok": 0.75, "final": 0.25}}
    made, _ = scored([ended("a", TRAIN)])
    assert reward_shares(made) == {}


def test_rules_survive_the_run_file_that_a_run_keeps(tmp_path: Path) -> None:
    known = {name: kind for name, kind in sections().items() if name in ("run", "rewards", "credit")}
    text = '[run]\nname = "x"\n[rewards]\nhook = "a:b"\nrules = [{ on = "tokens", over = 5, value = -0.1, agents = ["w"] }]\n'
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    file = load(tmp_path / "run.toml", known)
    (tmp_path / "kept.toml").write_text(tomli_w.dumps(to_toml_table(file)), encoding="utf-8")
    kept = load(tmp_path / "kept.toml", known)
    assert kept.sections == file.sections
    assert kept.section(RewardsSection).rules[0].agents == ["w"]


@pytest.mark.parametrize(
    ("rewards", "wrong"),
    [
        (
            'rules = [{ on = "tool_eror", value = 1 }]',
            r"rewards.rules\[0\].on: .* 'tool_eror'; the value is 'tool_eror'. Choose from: tool_error, tool_ok",
        ),
        ('rules = [{ on = "tool_ok", value = 0 }]', "other than 0"),
        ('rules = [{ on = "tool_ok", value = 1, caps = 2 }]', r"rewards.rules\[0\].caps \(did you mean cap\?\)"),
        ("emited = 1", "did you mean emitted"),
    ],
)
def test_a_mistake_in_a_rule_is_told_with_its_place(tmp_path: Path, rewards: str, wrong: str) -> None:
    (tmp_path / "run.toml").write_text(f"[rewards]\n{rewards}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=wrong):
        load(tmp_path / "run.toml", {"rewards": RewardsSection})
