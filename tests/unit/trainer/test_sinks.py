"""Metrics reach whoever is asked to show them, each line once, and nobody who shows them can stop a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lightning_bus import ConfigError
from trainer.config import PolicySection, TrainSection
from trainer.metrics import MetricsFile
from trainer.session import Session
from trainer.sinks import Sinks, flattened, refuse_missing

LINE = {
    "phase": "rl", "step": 3, "version": 4, "wall_s": 1.5, "reward_mean": 0.5, "dropped": {"stale": 2},
    "reward_shares": {"final": 1.0}, "note": "words", "none": None,
}  # fmt: skip
NUMBERS = {
    "rl/step": 3, "rl/version": 4, "rl/wall_s": 1.5, "rl/reward_mean": 0.5, "rl/dropped/stale": 2,
    "rl/reward_shares/final": 1.0,
}  # fmt: skip
WITHOUT_STEP = {name: value for name, value in NUMBERS.items() if name != "rl/step"}  # where it is the axis


def a_run(directory: Path, *names: Any) -> Any:
    train = TrainSection(tasks="", held_out="", log=list(names), log_project="agents")
    sections = {TrainSection: train, PolicySection: PolicySection(model="")}
    return SimpleNamespace(directory=directory, section=sections.get, run=SimpleNamespace(name="calc", seed=7))


class Said(ModuleType):
    """Stands for wandb or trackio: remembers what was said to it, in order."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        super().__init__(name)
        self.said: list[tuple[str, Any, Any]] = []
        self.__spec__ = SimpleNamespace(name=name)  # pyright: ignore[reportAttributeAccessIssue] - find_spec looks at it
        for verb in ("init", "log", "finish", "define_metric"):
            setattr(self, verb, self._hears(verb, fails_at))

    def _hears(self, verb: str, fails_at: str) -> Any:
        def hear(*arguments: Any, **named: Any) -> Any:
            if verb == fails_at:
                raise RuntimeError("no network")
            self.said.append((verb, arguments, named))
            return self

        return hear


def test_numbers_are_flattened_behind_their_phase() -> None:
    assert flattened(LINE) == NUMBERS


def test_wandb_goes_on_with_the_run_of_that_id_and_each_phase_has_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Said("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    sinks = Sinks(a_run(tmp_path, "wandb"), "calc-1a")
    sinks.write(LINE)
    sinks.close()
    verbs = [verb for verb, _, _ in wandb.said]
    assert verbs == ["init", *["define_metric"] * 8, "log", "finish"]
    named = wandb.said[0][2]
    assert {key: named[key] for key in ("project", "name", "id", "resume", "dir")} == {
        "project": "agents", "name": "calc", "id": "calc-1a", "resume": "allow", "dir": str(tmp_path),
    }  # fmt: skip
    assert named["config"]["seed"] == 7 and named["config"]["train"]["rl"]["lr"] == 1e-6
    assert ("define_metric", ("rl/*",), {"step_metric": "rl/step"}) in wandb.said
    assert wandb.said[-2] == ("log", (NUMBERS,), {})


def test_the_environment_of_wandb_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Said("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "tuesday")
    Sinks(a_run(tmp_path, "wandb"), "calc-1a")
    named = wandb.said[0][2]
    assert (named["project"], named["name"]) == ("theirs", "tuesday")


def test_trackio_is_given_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = Said("trackio")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    sinks = Sinks(a_run(tmp_path, "trackio"), "calc-1a")
    sinks.write(LINE)
    sinks.close()
    (_, _, named), *rest = trackio.said
    assert (named["project"], named["name"], named["resume"]) == ("agents", "calc-1a", "allow")
    assert rest == [("log", (WITHOUT_STEP,), {"step": 3}), ("finish", (), {})]


def test_tensorboard_shows_what_the_line_says(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sinks = Sinks(a_run(tmp_path, "tensorboard"), "calc-1a")
    sinks.write(LINE)
    sinks.write({**LINE, "step": 4, "reward_mean": 0.75})
    sinks.close()
    read = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(WITHOUT_STEP)
    assert [(event.step, event.value) for event in read.Scalars("rl/reward_mean")] == [(3, 0.5), (4, 0.75)]


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_sink_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_at: str
) -> None:
    trackio = Said("trackio")
    monkeypatch.setitem(sys.modules, "wandb", Said("wandb", fails_at))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    sinks = Sinks(a_run(tmp_path, "wandb", "trackio"), "calc-1a")
    sinks.write(LINE)
    sinks.write(LINE)
    sinks.close()
    assert [record.message for record in caplog.records if "no network" in record.message and "wandb" in record.message]
    assert len(caplog.records) == 1
    assert [verb for verb, _, _ in trackio.said] == ["init", "log", "log", "finish"]


def test_a_sink_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_missing(["console"])
    with pytest.raises(ConfigError, match="asks for 'wandb' .* pip install wandb"):
        refuse_missing(["console", "wandb"])


def test_a_line_that_was_said_before_is_not_shown_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trainer.sinks")
    for _ in range(2):  # two lives of one run
        session: Any = SimpleNamespace(
            metrics=MetricsFile(tmp_path / "metrics.jsonl"), sinks=Sinks(a_run(tmp_path, "console"), "calc-1a")
        )
        Session.tell(session, LINE)
    assert [record.message for record in caplog.records] == ["rl step 3: reward_mean 0.5"]
