"""Imitation: the same rows in the same order whatever died, and a teacher that taught nothing is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_bus import ConfigError, Status, Submission
from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout
from tests.bus_fixtures import span
from tests.unit.trainer.serving_fixtures import build_model
from trainer.algorithms.sft import imitate
from trainer.config import PolicySection, SftSection, TrainSection
from trainer.metrics import MetricsFile
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.session import Progress, Session

pytestmark = pytest.mark.anyio

SFT = SftSection(rollouts=4, epochs=3, batch_rollouts=2, lr=1e-2)


class Teacher:
    """Stands for the stream: every rollout ends with one call, or fails."""

    def __init__(self, *, untrainable: str = "") -> None:
        self.untrainable = untrainable

    async def carry_out(self, submissions: list[Submission], run_dir: Path) -> list[FinishedRollout]:
        return [self._ended(number, one) for number, one in enumerate(submissions)]

    def saved_state(self) -> dict[str, Any]:
        return {"offset": 7, "consumed": {}}

    def _ended(self, number: int, one: Submission) -> FinishedRollout:
        assert one.model == "teacher"
        attributes: dict[str, Any] = {
            s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: s.pack_ids([1, 2]), s.RESPONSE_IDS: s.pack_ids([3 + number, 9]),
            s.LOGPROBS: s.pack_logprobs([0.0, 0.0]), s.WEIGHT_VERSIONS: [["scripted", 0, 2]], s.TEMPERATURE: 1.0,
        }  # fmt: skip
        if self.untrainable:
            attributes[s.UNTRAINABLE] = self.untrainable
        calls = [span("chat", one.rollout_id, 1, **attributes)]
        return FinishedRollout(one.rollout_id, one.group, {}, Status.SUCCEEDED, 1, 1.0, "", calls, 0, 1)


class Died(Exception):
    """The trainer's end, where the test wants it."""


class Life(SimpleNamespace):
    """A session without bus and engines, with the real checkpoints. Dies before checkpoint number `dies_at`."""

    resume, restore_optimizer, note = Session.resume, Session.restore_optimizer, Session.note

    def __init__(self, directory: Path, dies_at: int = 0) -> None:
        super().__init__(
            run=SimpleNamespace(run=SimpleNamespace(seed=5), section=lambda kind: kind()),
            policy=PolicySection(model=""), train=TrainSection(tasks="", held_out="", sft=SFT),
            model=build_model(), progress=Progress(), directory=directory, checkpoints=directory / "checkpoints",
            metrics=MetricsFile(directory / "metrics.jsonl"), published=[], dies_at=dies_at,
        )  # fmt: skip

    def tell(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)

    def checkpoint(self, optimizer: Optimizer) -> None:
        if self.progress.checkpoints + 1 == self.dies_at:
            raise Died
        Session.checkpoint(self, optimizer)  # pyright: ignore[reportArgumentType]

    async def retain(self) -> None:
        pass  # which needs the bus

    async def publish(self) -> None:
        assert checkpoint.latest(self.checkpoints) is not None
        self.published.append(self.progress.version)


async def test_imitation_learns_and_publishes_version_1_with_what_it_learnt_from(tmp_path: Path) -> None:
    life = Life(tmp_path)
    await imitate(life, Teacher(), list(range(9)))  # pyright: ignore[reportArgumentType]
    assert life.published == [1]
    progress = life.progress
    assert (progress.phase, progress.step, progress.version, progress.parent) == ("rl", 0, 1, 0)
    assert [rollout_id for rollout_id, _, _ in progress.trained] == [f"teacher-{n:05d}" for n in range(4)]
    assert progress.stream == {"offset": 7, "consumed": {}}
    lines = list(life.metrics.lines())
    assert [(line["phase"], line["step"]) for line in lines] == [("teacher", 0), ("sft", 1), ("sft", 2), ("sft", 3)]
    assert lines[-1]["loss"] < lines[1]["loss"]


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
async def test_a_killed_imitation_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, dies_at: int) -> None:
    unbroken = Life(tmp_path / "unbroken")
    await imitate(unbroken, Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(Died):
        await imitate(Life(tmp_path / "killed", dies_at), Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]
    life = Life(tmp_path / "killed")
    life.resume()  # pyright: ignore[reportCallIssue]
    await imitate(life, Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]
    for ours, theirs in zip(life.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    said = [
        [(line["phase"], line["step"], line.get("loss")) for line in one.metrics.lines()] for one in (life, unbroken)
    ]
    assert said[0] == said[1]


async def test_a_teacher_that_taught_nothing_is_told_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        await imitate(Life(tmp_path), Teacher(untrainable="no token ids"), list(range(4)))  # pyright: ignore[reportArgumentType]
    for words in ("nothing to imitate", "4 rollouts", "'teacher'", "no token ids", "lightning-bus spans teacher-00000"):
        assert words in str(caught.value)
