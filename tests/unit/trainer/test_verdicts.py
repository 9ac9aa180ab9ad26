"""What a reward hook said is in the log: a trainer that resumes, and a replay, do not ask again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from lightning_bus import Client, HookPool, Kind, LogReader, Record, Status, Submission
from lightning_bus.adapters import Cursor, FinishedRollout, RewardsSection
from lightning_bus.log.verify import verify
from lightning_bus.rescoring import Rescoring, Verdicts, read_verdicts, replay
from lightning_bus.rescoring.verdicts import verdict_span
from lightning_bus.spans import encode_spans
from tests.bus_fixtures import broker, span
from tests.unit.trainer.test_stream import Tape, a_log
from trainer.data.stream import TRAIN, RolloutStream, submission

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.name == "nt", reason="hook processes need process groups"),
]

HOOK = """
import pathlib
from lightning_bus.adapters import Reward

def reward(rollout):
    with pathlib.Path("asked").open("a") as file:
        file.write(rollout.rollout_id + "\\n")
    if rollout.rollout_id == "a-1" and not pathlib.Path("mended").exists():
        raise ValueError("the judge is away")
    if rollout.rollout_id.endswith("0"):
        return 0.75
    return [Reward(b"", 0.25, "whole"), Reward(rollout.spans[0].span_id, 0.5, "part")]
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the hook notes whom it was asked about."""
    (tmp_path / "verdict_hooks.py").write_text(HOOK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "asked"


def whom(asked: Path) -> list[str]:
    """Return whom the hook was asked about since this was last looked at."""
    names = sorted(asked.read_text().split()) if asked.exists() else []
    asked.unlink(missing_ok=True)
    return names


async def carry_out(bus: Client, names: list[str]) -> None:
    """Have these rollouts done, each with a span and a reward of 0 that the agent gave itself."""
    submissions: list[Submission] = [submission(name, name, TRAIN, group=name[0]) for name in names]
    await bus.submit(submissions)
    async with bus.lease(1) as leases:
        for _ in names:
            task = await anext(aiter(leases))
            await bus.append(task.rollout_id, task.attempt, [span("step", task.rollout_id, task.attempt)])
            await leases.done(task, 0.0)


@asynccontextmanager
async def a_life(bus: Client, hook: str = "verdict_hooks:reward") -> AsyncIterator[RolloutStream]:
    async with HookPool(hook) as hooks, anyio.create_task_group() as background:
        stream = RolloutStream(bus, 2, Cursor(), 20.0, hooks=hooks)
        background.start_soon(stream.run)
        yield stream
        background.cancel_scope.cancel()


def said(rollouts: tuple[FinishedRollout, ...]) -> list[tuple[float | None, object]]:
    return [(one.reward, one.judged) for one in rollouts]


async def test_a_trainer_that_resumes_finds_the_verdicts_and_asks_only_where_there_was_none(
    tmp_path: Path, asked: Path
) -> None:
    async with broker(tmp_path / "log") as address, Client(address, role="trainer") as first:
        await carry_out(first, ["a-0", "a-1", "b-0", "b-1"])
        async with a_life(first) as stream:
            groups = await stream.next_groups(2)
        assert said(groups[0].rollouts)[1] == (None, None)
        assert whom(asked) == ["a-0", "a-1", "b-0", "b-1"]
        (tmp_path / "mended").touch()
        async with Client(address, role="trainer") as second, a_life(second) as stream:
            again = await stream.next_groups(2)
        assert whom(asked) == ["a-1"], "it raised: that is no verdict"
        assert said(again[0].rollouts)[0] == said(groups[0].rollouts)[0] == (0.75, 0.75)
        assert said(again[1].rollouts) == said(groups[1].rollouts)
        assert again[0].rollouts[1].reward == 0.25
        # A hook that was changed is another judge.
        (tmp_path / "verdict_hooks.py").write_text(HOOK.replace("0.75", "0.5"), encoding="utf-8")
        async with Client(address, role="trainer") as third, a_life(third) as stream:
            (changed, _) = await stream.next_groups(2)
        assert len(whom(asked)) == 4
        assert changed.rollouts[0].reward == 0.5
    report = verify(tmp_path)
    assert not [check for check in report.checks if check.offenders]


class Asked:
    """Stands for the processes of a hook: notes what was known of whom it was to judge."""

    hook, code = "m:f", "c0de"

    def __init__(self) -> None:
        self.known: list[object] = []

    async def judge(self, rollouts: Sequence[FinishedRollout], *, known: Verdicts, keep: object) -> object:
        self.known += [known.of(one) for one in rollouts]
        return rollouts


class ShownLog(Tape):
    session = "this trainer"

    async def fetch(self, offset: int, *, bytes_max: int) -> tuple[list[Record], int, int]:
        return [], offset, len(self.records)


async def test_nobody_is_asked_before_the_log_is_read_to_where_it_ended_when_this_life_began() -> None:
    """A verdict stands behind the end of its rollout: a group is complete before it is known what was said of it."""
    records = a_log([(f"a-{n}", TRAIN) for n in range(2)] * 3)
    complete = len(records)
    rollouts = [FinishedRollout(f"a-{n}", "a", {}, Status.SUCCEEDED, 1, 1.0, "", [], 0, 1) for n in range(2)]
    kept = [
        (verdict_span(rollouts[0], 0.5, hook="m:f", code="c0de"), "an earlier life"),
        (verdict_span(rollouts[1], 0.5, hook="m:f", code="of another file"), "an earlier life"),
        (verdict_span(rollouts[1], 0.5, hook="m:g", code="c0de"), "an earlier life"),
    ]
    for one, producer in kept:
        body = encode_spans([one])
        records.append(Record(len(records), Kind.SPANS, producer, 1, 1, 0, "", 0, 1, 0, body))
    tape, hooks = ShownLog(records), Asked()
    stream = RolloutStream(tape, 2, Cursor(), 20.0, hooks=hooks)  # type: ignore[arg-type]
    async with anyio.create_task_group() as background:
        background.start_soon(stream.run)
        await tape.show(complete)
        background.start_soon(stream.next_groups, 1)
        await anyio.wait_all_tasks_blocked()
        assert hooks.known == []
        await tape.show(len(records))
        await anyio.wait_all_tasks_blocked()
        background.cancel_scope.cancel()
    assert hooks.known == [0.5, None], "only what this very hook said counts"


async def test_a_replay_finds_what_the_run_was_trained_by(tmp_path: Path, asked: Path) -> None:
    (tmp_path / "mended").touch()
    async with broker(tmp_path / "log") as address, Client(address, role="trainer") as bus:
        await carry_out(bus, ["a-0", "a-1"])
        async with a_life(bus) as stream:
            (group,) = await stream.next_groups(1)
    assert whom(asked) == ["a-0", "a-1"]
    own = RewardsSection(hook="verdict_hooks:reward")
    with LogReader(tmp_path / "log") as reader:
        same = await replay(reader, Rescoring(rewards=own, before=own))
        assert whom(asked) == []
        assert (same.recalled, same.differences.changed, same.differences.mean(after=True)) == (2, 0, 0.5)
        again = await replay(reader, Rescoring(rewards=own, before=own, ask_again=True))
        assert (again.recalled, whom(asked)) == (0, ["a-0", "a-1"])
        # Without a hook of its own a replay is compared with what the run's hook said, not with what the agent gave itself.
        bare = await replay(reader, Rescoring(rewards=RewardsSection(), before=own))
        assert (bare.differences.mean(after=False), bare.differences.mean(after=True)) == (0.5, 0.0)
        found = Verdicts("verdict_hooks:reward")
        read_verdicts(reader.records(), found)
    assert [found.of(one) for one in group.rollouts] == [one.judged for one in group.rollouts]
