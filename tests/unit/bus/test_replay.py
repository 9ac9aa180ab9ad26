"""Recorded runs scored again: from a log that the broker's core wrote to tables, and through the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bus import cli
from lightning_bus.adapters import FinishedRollout, RewardsSection, RuleSection
from lightning_bus.config import CreditSection
from lightning_bus.errors import CallError, ConfigError
from lightning_bus.lifecycle import Status
from lightning_bus.log.reader import LogReader
from lightning_bus.log.tables import Format
from lightning_bus.rescoring import Replayed, Rescoring, finished_groups, finished_rollouts, read_scores, replay
from lightning_bus.rescoring.replay import ROLLOUT_COLUMNS, TRANSITION_COLUMNS
from tests.recorded_agent import Play
from tests.recorded_run import write_run

Rows = list[dict[str, Any]]

HOOK = """
import time

def reward(rollout):
    if rollout.rollout_id.endswith("2"):
        raise ValueError("cannot judge")
    return float(rollout.task["right"])

def upside_down(rollout):
    return -rollout.reward
"""


def members(group: str, count: int = 4) -> list[FinishedRollout]:
    """A group: every second rollout's tool failed, the first half earned 1, and all took two turns."""
    made: list[FinishedRollout] = []
    for number in range(count):
        play = Play(rollout_id=f"{group}-{number}", group=group)
        play.say("", ("calc", "{}"))
        play.tool("Error: no" if number % 2 else "2")
        play.say(f"done {number}")
        made.append(play.finish(float(number < count / 2)))
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two groups whose rollouts end in turn, a lone rollout, one that failed, and one that has not ended."""
    one, two = members("a"), members("b")
    lone = Play(rollout_id="lone", group="")
    lone.say("hello")
    failed = Play(rollout_id="a-failed", group="a")
    failed.say("oops")
    ended = [rollout for pair in zip(one, two, strict=True) for rollout in pair]
    ended = [*ended[:-1], lone.finish(0.5), failed.finish(None, Status.FAILED, "Traceback\nKeyError: 'x'"), ended[-1]]
    tasks = {rollout.rollout_id: {"right": number % 2} for number, rollout in enumerate(ended)}
    return write_run(tmp_path / "run", ended, tasks=tasks, open_=["later"])


@pytest.fixture
def reader(run: Path) -> Iterator[LogReader]:
    with LogReader(run / "log") as opened:
        yield opened


def replayed(reader: LogReader, how: Rescoring, out: Path | None = None, form: Format = "jsonl") -> Replayed:
    return anyio.run(partial(replay, reader, how, out, form))


def read(directory: Path, name: str) -> Rows:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


RULES = RewardsSection(rules=[RuleSection(on="tool_error", value=-0.25)])


def test_groups_come_whole_and_in_the_order_in_which_they_became_so(reader: LogReader) -> None:
    groups = [[rollout.rollout_id for rollout in group] for group in finished_groups(reader)]
    assert groups == [["lone"], ["a-0", "a-1", "a-2", "a-3", "a-failed"], ["b-0", "b-1", "b-2", "b-3"]]
    told: list[tuple[int, int]] = []
    found = finished_rollouts(
        reader, labels={"phase": "train"}, progress=lambda done, total: told.append((done, total))
    )
    assert list(found) == []
    assert told[-1] == (reader.end_offset, reader.end_offset)


@settings(max_examples=15)
@given(st.permutations([f"{group}-{number}" for group in "abc" for number in range(3)]), st.integers(0, 9))
def test_groups_are_whole_whatever_order_their_rollouts_end_in(order: list[str], ended: int) -> None:
    plays = {name: Play(rollout_id=name, group=name[0]) for name in order}
    for play in plays.values():
        play.say("x")
    with TemporaryDirectory() as directory:
        write_run(Path(directory), [plays[name].finish() for name in order[:ended]], open_=["open"])
        with LogReader(Path(directory) / "log") as opened:
            found = [[rollout.rollout_id for rollout in group] for group in finished_groups(opened)]
    last = {name[0]: at for at, name in enumerate(order[:ended])}  # where each group became whole
    assert found == [
        sorted(name for name in order[:ended] if name[0] == group) for group in sorted(last, key=lambda g: last[g])
    ]


def test_a_replay_writes_transitions_scores_and_what_was_asked(reader: LogReader, tmp_path: Path) -> None:
    how = Rescoring(RULES, CreditSection(rule="turn", relevance=0.5))
    result = replayed(reader, how, tmp_path / "new")
    transitions, rollouts = read(tmp_path / "new", "transitions"), read(tmp_path / "new", "rollouts")
    assert {tuple(row) for row in transitions} == {tuple(TRANSITION_COLUMNS)}
    assert {tuple(row) for row in rollouts} == {tuple(ROLLOUT_COLUMNS)}
    assert result.transitions == len(transitions) == 8 * 2 + 2
    by_id = {row["rollout_id"]: row for row in rollouts}
    assert by_id["a-1"]["sources"] == {"final": 1.0, "tool_error": -0.25}
    assert by_id["a-1"]["shares"] == {"final": 0.8, "tool_error": -0.2}
    assert (by_id["a-1"]["return_before"], by_id["a-1"]["return"], by_id["a-1"]["reward"]) == (1.0, 0.75, 1.0)
    failed = by_id["a-failed"]
    assert (failed["return"], failed["dropped"], failed["detail"]) == (None, "rollout failed", "KeyError: 'x'")
    first, second = (row for row in transitions if row["rollout_id"] == "a-1")
    assert (first["turn"], first["reward"], second["reward"]) == (0, -0.25, 0.0)
    assert [reward["source"] for reward in first["rewards"]] == ["tool_error"]
    assert first["rewards"][0]["span_id"] == second["span_id"]  # the request that told the result
    assert first["next_state"] == second["state"] == first["state"] + first["action"]
    assert second["next_state"] is None
    # own reward less the mean own of the group, and half of the final one's distance from the mean
    owns = np.mean([0, -0.125, 0, -0.125])
    assert first["advantage"] == pytest.approx(-0.25 - owns + 0.5 * 0.5)
    assert second["advantage"] == pytest.approx(-owns + 0.5)
    (oops,) = (row for row in transitions if row["rollout_id"] == "a-failed")
    assert (oops["advantage"], oops["rollout_return"]) == (None, None)
    told = json.loads((tmp_path / "new" / "replay.json").read_text())
    assert told["asked"]["credit"]["rule"] == "turn"
    assert (told["rollouts"], told["dropped"]) == (10, {"rollout failed": 1})


def test_advantages_of_a_group_sum_to_zero_and_a_lone_rollout_has_none(reader: LogReader, tmp_path: Path) -> None:
    replayed(reader, Rescoring(RULES), tmp_path / "new")
    transitions = read(tmp_path / "new", "transitions")
    for group in ("a", "b"):
        of_rollout = {
            row["rollout_id"]: row["advantage"]
            for row in transitions
            if row["group"] == group and row["advantage"] is not None
        }
        assert len(of_rollout) == 4
        assert sum(of_rollout.values()) == pytest.approx(0.0, abs=1e-6)
    assert [row["advantage"] for row in transitions if row["rollout_id"] == "lone"] == [0.0]


def test_the_same_replay_again_writes_the_same_bytes(reader: LogReader, tmp_path: Path) -> None:
    for name in ("one", "two"):
        replayed(reader, Rescoring(RULES), tmp_path / name)
    for file in ("transitions.jsonl", "rollouts.jsonl", "replay.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_parquet_holds_what_jsonl_holds(reader: LogReader, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'lightning-bus[parquet]'")
    replayed(reader, Rescoring(RULES), tmp_path / "lines")
    replayed(reader, Rescoring(RULES), tmp_path / "columns", "parquet")
    for name, json_columns in (
        ("transitions", ("weight_versions", "rewards")),
        ("rollouts", ("labels", "sources", "shares")),
    ):
        rows = parquet.read_table(tmp_path / "columns" / f"{name}.parquet").to_pylist()
        for row in rows:
            for column in json_columns:
                row[column] = json.loads(row[column])
        assert rows == read(tmp_path / "lines", name)


def test_nothing_is_written_when_only_a_comparison_is_wanted(reader: LogReader, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = replayed(reader, Rescoring(RULES))
    assert sorted(tmp_path.rglob("*")) == before
    facts = result.differences.facts()
    assert (facts["rollouts"], facts["changed"], facts["pairs_untied"]) == (10, 4, 4)
    assert facts["sources_after"]["tool_error"]["mean"] == pytest.approx(-0.25 * 4 / 9)


def test_a_failed_replay_leaves_nothing(reader: LogReader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        replayed(reader, Rescoring(RewardsSection(hook="no_such_module:reward")), tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CallError, match="Nothing is overwritten"):
        replayed(reader, Rescoring(), tmp_path / "full")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.part").exists()


def test_what_a_log_cannot_tell_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a critic"):
        Rescoring(credit=CreditSection(rule="value"))
    with pytest.raises(ConfigError, match="a log does not say which"):
        Rescoring(credit=CreditSection(estimator="reinforce++"))


# -- through the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "judges.py").write_text(HOOK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    with pytest.raises(SystemExit) as left:
        cli.main([*argv, "--json"])
    assert left.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(os.name == "nt", reason="hook processes need process groups")
def test_a_hook_replaces_rewards_and_drops_what_it_cannot_judge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = command(capsys, "replay", "run", "--reward", "judges:reward", "--out", "new")
    assert facts["dropped"] == {"hook raised ValueError": 2, "rollout failed": 1}
    rows = {row["rollout_id"]: row for row in read(here / "new", "rollouts")}
    assert (rows["a-2"]["return"], rows["a-2"]["detail"]) == (None, "cannot judge")
    assert [rows[name]["sources"] for name in ("a-0", "b-0")] == [{"hook": 0.0}, {"hook": 1.0}]
    assert rows["a-failed"]["dropped"] == "rollout failed"
    scores = read_scores(here / "new")
    assert (scores["b-0"].total, scores["a-2"].total) == (1.0, None)
    again = command(capsys, "replay", "run", "--reward", "judges:upside_down", "--against", "new")["differences"]
    assert (again["gained"], again["lost"]) == (2, 0)
    assert again["most_changed"][0]["before"] is None


def test_rules_come_from_the_run_or_from_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = '[rewards]\nrules = [{ on = "tool_error", value = -0.25 }]\n[credit]\nrule = "turn"\n'
    (here / "rules.toml").write_text(rules)
    new = command(capsys, "replay", "run", "--rules", "rules.toml")["differences"]
    assert (new["changed"], new["mean_before"]) == (4, pytest.approx(4.5 / 9))
    (here / "run" / "run.toml").write_text(rules + "[anything]\nelse = 1\n")
    own = command(capsys, "replay", "run")["differences"]
    assert (own["changed"], own["mean_before"]) == (0, new["mean_after"])
    (here / "rules.toml").write_text('[credit]\nrule = "leave_one_out"\n')
    command(capsys, "replay", "run", "--rules", "rules.toml", "--gamma", "0.5", "--out", "new")
    asked = json.loads((here / "new" / "replay.json").read_text())["asked"]
    assert (asked["credit"]["rule"], asked["credit"]["gamma"]) == ("leave_one_out", 0.5)
    assert [one["on"] for one in asked["rewards"]["rules"]] == ["tool_error"]


def test_the_table_shows_what_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rules.toml").write_text('[rewards]\nrules = [{ on = "tool_error", value = -3.0, name = "[bold]x" }]\n')
    with pytest.raises(SystemExit):
        cli.main(["replay", "run", "--rules", "rules.toml", "--out", "new"])
    shown = capsys.readouterr().out
    for text in ("whose return changed", "[bold]x", "a-1", "another best", "written: new"):
        assert text in shown


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        (["--rules", "none.toml"], "none.toml: no such file"),
        (["--relevance", "7"], "relevance"),
        (["--label", "phase"], "write KEY=VALUE"),
        (["--against", "nowhere"], "holds no scores"),
        (["--agent", "/(/"], "not a regular expression"),
        (["--reward", "judges:nothing"], "cannot be loaded"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], wrong: str
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["replay", "run", *argv])
    assert left.value.code == 2
    assert wrong in capsys.readouterr().err


def test_the_same_log_becomes_data_sets_for_other_trainers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = command(capsys, "export", "run", "--as", "chat", "--out", "chat", "--return-min", "1")
    assert chat == {"rows": 4, "left_out": {"rollout below return_min": 6}}
    assert {row["reward"] for row in read(here / "chat", "chat")} == {1.0}
    pairs = command(capsys, "export", "run", "--as", "preferences", "--out", "pairs", "--margin-min", "0.5")
    assert pairs == {"rows": 2, "left_out": {"fewer than two scored rollouts": 1}}
    assert [row["margin"] for row in read(here / "pairs", "preferences")] == [1.0, 1.0]
    made = command(capsys, "export", "run", "--as", "transitions", "--out", "transitions")
    assert (made["transitions"], len(read(here / "transitions", "transitions"))) == (18, 18)
    (here / "rules.toml").write_text('[rewards]\nrules = [{ on = "tool_error", value = -3.0 }]\n')
    command(capsys, "replay", "run", "--rules", "rules.toml", "--out", "scores")
    scored = command(capsys, "export", "run", "--as", "preferences", "--out", "rescored", "--scores", "scores")
    assert scored["rows"] == 2
    assert {row["margin"] for row in read(here / "rescored", "preferences")} == {4.0}
