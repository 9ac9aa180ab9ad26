"""What a resumed trainer does first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import training
from trainer.config import SftSection, TrainSection
from trainer.session import Progress

pytestmark = pytest.mark.anyio


class Life(SimpleNamespace):
    """A session that remembers in which order things happened to it."""

    def __init__(self, directory: Path, **progress: Any) -> None:
        train = TrainSection(tasks="", held_out="", sft=SftSection(rollouts=1))
        super().__init__(progress=Progress(**progress), train=train, directory=directory, happened=[])

    async def publish(self) -> None:
        self.happened.append("publish")

    async def refuse_other_tokens(self) -> None: ...

    def tell(self, line: dict[str, Any]) -> None:
        self.happened.append("tell")


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        ({}, ["publish", "evaluate", "imitate", "evaluate"]),
        # Half imitated weights are no version: pushed as version 0 they would not be what version 0 is.
        ({"phase": "sft", "step": 2}, ["imitate", "evaluate"]),
        ({"phase": "rl", "step": 3, "line": {"phase": "rl"}}, ["publish", "tell", "reinforce", "evaluate"]),
        ({"phase": "done", "step": 4}, ["publish", "evaluate"]),
    ],
)
async def test_what_is_behind_a_run_is_skipped_and_a_version_is_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: dict[str, Any], expected: list[str]
) -> None:
    life = Life(tmp_path, **progress)
    for name in ("evaluate", "imitate", "reinforce", "cancel_unfinished"):

        async def happen(*arguments: Any, name: str = name) -> None:
            life.happened.append(name)

        monkeypatch.setattr(training, name, happen)
    await training.run_stages(life, None, [], [], None)  # pyright: ignore[reportArgumentType]
    assert [what for what in life.happened if what != "cancel_unfinished"] == expected
