"""Going back to a version keeps what was counted and restores what was learnt, or changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_bus import CallError, Conflict, NotFound, RunFile, RunSection, WeightVersion
from tests.reference.rows import make_rows
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer.config import PolicySection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.losses import cispo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.model import load_policy, named_weights, save_policy
from trainer.registry import Registry
from trainer.rollback import export, roll_back, untrained
from trainer.session import Progress
from trainer.training import sole_writer


class History:
    """A run that has made versions 0 to 4, one checkpoint each, and published them; nothing of it runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = build_model()
        self.optimizer = Optimizer(self.model, lr=1e-2)
        self.weights = [self._copy()]
        self.progress = Progress()
        self.known = {0: self._record(directory / "policy")}
        save_policy(self.model, build_tokenizer(), directory / "policy")
        for _ in range(4):
            self.learn()

    def learn(self) -> None:
        progress = self.progress
        packs = pack_rows(make_rows(progress.version, [9, 14]), [1.0, -1.0], token_budget=64)
        train_step(self.model, self.optimizer, packs, cispo())
        progress.phase, progress.step = "rl", progress.step + 1
        progress.parent, progress.version = progress.version, progress.version + 1
        progress.checkpoints += 1
        progress.rewards.append(progress.step / 10)
        progress.submitted_groups, progress.consumed_groups = 3 * progress.step, 2 * progress.step
        progress.stream = {"offset": 100 * progress.step, "consumed": {}}
        progress.evals[str(progress.version)] = 0.5
        progress.trained, progress.line = [("r-0", 1, [b"12345678"])], {"phase": "rl"}
        path = checkpoint.save(
            self.directory / "checkpoints",
            progress.checkpoints,
            self.model,
            self.optimizer,
            msgspec.to_builtins(progress),
        )
        self.weights.append(self._copy())
        self.known[progress.version] = self._record(path)

    @property
    def registry(self) -> Registry:
        return Registry(self.known)

    def newest(self) -> tuple[Progress, LlamaForCausalLM, Optimizer]:
        """What a trainer that starts now takes over."""
        path = checkpoint.latest(self.directory / "checkpoints")
        assert path is not None
        model = build_model(seed=9)
        optimizer = Optimizer(model, lr=1e-2)
        return msgspec.convert(checkpoint.load(path, model, optimizer).extra, Progress), model, optimizer

    def holds(self, model: torch.nn.Module, number: int) -> bool:
        return all(torch.equal(tensor, self.weights[number][name]) for name, tensor in named_weights(model))

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in named_weights(self.model)}

    def _record(self, path: Path) -> WeightVersion:
        return WeightVersion(
            version=self.progress.version, parent=self.progress.parent, phase=self.progress.phase,
            step=self.progress.step, path=str(path), checksum="c",
        )  # fmt: skip


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "r")


@pytest.fixture
def run(history: History) -> RunFile:
    sections = {
        "run": RunSection(name="r", directory=str(history.directory.parent)),
        "policy": PolicySection(model="unused"),
        "train": TrainSection(tasks="unused", held_out="unused"),
    }
    return RunFile(history.directory.parent / "run.toml", sections)


def test_a_rollback_restores_what_was_learnt_and_keeps_what_was_counted(history: History) -> None:
    told = roll_back(history.directory, history.registry, 2)
    progress, model, optimizer = history.newest()
    assert msgspec.json.encode(progress) == msgspec.json.encode(told)
    assert history.holds(model, 2)
    assert (progress.version, progress.parent, progress.rolled_back) == (5, 2, 5)
    assert (progress.phase, progress.step, progress.rewards, optimizer.updates) == ("rl", 2, [0.1, 0.2], 2)
    assert (progress.submitted_groups, progress.consumed_groups, progress.checkpoints) == (12, 8, 5)
    assert progress.stream == {"offset": 400, "consumed": {}}
    assert (progress.trained, progress.line) == ([], {})
    assert progress.evals == {str(number): 0.5 for number in range(1, 5)}


def test_what_goes_on_from_a_rollback_learns_as_the_version_did(history: History) -> None:
    unbroken = History(history.directory.parent / "unbroken")
    roll_back(history.directory, history.registry, 2)
    _, model, optimizer = history.newest()
    train_step(model, optimizer, pack_rows(make_rows(2, [9, 14]), [1.0, -1.0], token_budget=64), cispo())
    assert unbroken.holds(model, 3)


def test_a_run_that_is_done_goes_on_after_a_rollback(history: History) -> None:
    history.progress.phase = "done"
    history.progress.checkpoints += 1
    checkpoint.save(
        history.directory / "checkpoints", 5, history.model, history.optimizer, msgspec.to_builtins(history.progress)
    )
    roll_back(history.directory, history.registry, 3)
    progress, model, _ = history.newest()
    assert (progress.phase, progress.step, progress.checkpoints) == ("rl", 3, 6)
    assert history.holds(model, 3)


def test_the_first_policy_can_be_gone_back_to_without_imitating_again(history: History) -> None:
    roll_back(history.directory, history.registry, 0)
    progress, model, optimizer = history.newest()
    assert history.holds(model, 0)
    assert (progress.version, progress.parent, progress.phase, progress.step) == (5, 0, "rl", 0)
    assert (optimizer.updates, optimizer.tensors()) == (0, {})


def test_a_rollback_can_be_rolled_back(history: History) -> None:
    roll_back(history.directory, history.registry, 1)
    history.known[5] = msgspec.structs.replace(
        history.known[1], version=5, parent=1, path=str(checkpoint.latest(history.directory / "checkpoints"))
    )
    roll_back(history.directory, history.registry, 4)
    progress, model, _ = history.newest()
    assert (progress.version, progress.parent, progress.step) == (6, 4, 4)
    assert history.holds(model, 4)


def test_a_number_that_was_trained_but_not_published_is_not_used_again(history: History) -> None:
    del history.known[4]
    assert roll_back(history.directory, history.registry, 3).version == 5


@pytest.mark.parametrize(
    ("number", "spoil", "error", "message"),
    [
        (4, lambda directory: None, Conflict, "version 4 is the newest: there is nothing to go back from"),
        (7, lambda directory: None, NotFound, "no weight version 7: there are versions up to 4"),
        (2, lambda directory: _file(directory, 2).unlink(), NotFound, "weights of version 2 are gone"),
        (2, lambda directory: _file(directory, 1).rename(_file(directory, 2)), CallError, "holds version 1, not 2"),
        (2, lambda directory: _file(directory, 2).write_bytes(b"no"), CallError, "version 2 cannot be read"),
    ],
)
def test_a_rollback_that_cannot_be_says_why_and_changes_nothing(
    history: History, number: int, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    spoil(history.directory)
    before = sorted((history.directory / "checkpoints").iterdir())
    with pytest.raises(error, match=message):
        roll_back(history.directory, history.registry, number)
    assert sorted((history.directory / "checkpoints").iterdir()) == before
    assert history.holds(history.newest()[1], 4)


def test_a_run_that_was_never_trained_has_nothing_to_go_back_from(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="nothing has been trained yet"):
        roll_back(tmp_path, Registry(), 0)


def test_a_run_that_is_being_trained_is_left_alone(run: RunFile) -> None:
    with (
        checkpoint.writing(run.directory / "checkpoints"),
        pytest.raises(Conflict, match="is being trained. Stop the trainer first"),
        untrained(run),
    ):
        pass
    with untrained(run), pytest.raises(BlockingIOError), checkpoint.writing(run.directory / "checkpoints"):
        pass


@pytest.mark.anyio
async def test_a_trainer_waits_for_a_rollback_and_gives_up_on_another_trainer(run: RunFile) -> None:
    async with anyio.create_task_group() as tasks:
        with untrained(run):

            async def train() -> None:
                async with sole_writer(run.directory):
                    trained.set()

            trained = anyio.Event()
            tasks.start_soon(train)
            with pytest.raises(Conflict, match="another process trains .*A run has one trainer"):
                async with sole_writer(run.directory, limit_s=0.0):
                    pass
            assert not trained.is_set()
        await trained.wait()


def test_any_version_can_be_taken_away_as_a_model_directory(history: History, run: RunFile, tmp_path: Path) -> None:
    for number in (0, 2):
        export(run, history.registry.get(number), tmp_path / f"v{number}")
        assert history.holds(load_policy(tmp_path / f"v{number}"), number)
        assert (tmp_path / f"v{number}" / "tokenizer_config.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(Conflict, match="mine exists and is not empty"):
        export(run, history.registry.get(2), tmp_path / "mine")


def _file(directory: Path, number: int) -> Path:
    return checkpoint.path_of(directory / "checkpoints", number)
