"""What a trainer of several processes refuses, and what it does when one of them cannot train."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from lightning_bus import ConfigError, RunFile
from trainer import Algorithm, Trainer
from trainer.launch import other_ranks
from trainer.ranks import join

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]


async def test_a_rank_that_cannot_train_ends_the_trainer_as_it_ended(tmp_path: Path) -> None:
    nothing = RunFile(tmp_path / "missing.toml", {})
    with pytest.raises(ExceptionGroup) as raised:
        async with other_ranks(nothing, 2):
            await anyio.sleep_forever()
    assert raised.group_contains(ConfigError, match="rank 1 of this trainer ended with exit code 2")


async def test_nothing_is_started_for_one_process_or_beside_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = RunFile(Path("missing.toml"), {})
    async with other_ranks(nothing, 1) as store:
        assert store is None
    assert join("cpu", None, 1).size == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    for size in (1, 4):
        async with other_ranks(nothing, size) as store:
            assert store is None
    with pytest.raises(ConfigError, match=r"train\.processes is 2, and 4 processes were started"):
        async with other_ranks(nothing, 2):
            pass


def test_an_algorithm_that_other_processes_cannot_make_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    class Mine(Algorithm):
        def advantages(self, batch):
            return [0.0 for _ in batch]

        def loss(self, inputs):
            return -inputs.logprobs_K, {}

    settings = {"train.processes": 2}
    trainer = Trainer(algorithm=Mine(), policy="m:f", name="ours", directory=tmp_path, settings=settings)
    with pytest.raises(ConfigError, match="the other processes cannot make this Mine"):
        trainer.fit("examples.calc.agent:agent", [{}], [{}])
    assert not list(tmp_path.iterdir())
