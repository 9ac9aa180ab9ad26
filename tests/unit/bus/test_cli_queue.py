"""The commands on rollouts, before a broker in a process of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec
import pytest

from lightning_bus import Client, RunFile, cli, cli_shared, config
from tests.bus_fixtures import NOWHERE, BrokerProcess


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    with BrokerProcess(tmp_path / "log", max_attempts=1) as process:
        yield process.address


@pytest.fixture
def run(bus: str, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(bus, capsys)


class Run:
    """Runs commands against the broker of the test."""

    def __init__(self, bus: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.bus = bus
        self._capsys = capsys
        self.code = 0
        self.err = ""

    def __call__(self, *argv: str) -> str:
        """Return what a command printed."""
        with pytest.raises(SystemExit) as caught:
            cli.main([*argv, "--bus", self.bus])
        self.code = int(caught.value.code or 0)
        shown = self._capsys.readouterr()
        self.err = shown.err
        return shown.out

    def work(self, *, fail: bool = False, tasks: int = 1) -> list[object]:
        """Carry out tasks as a worker would; return them in the order they came."""
        seen: list[object] = []

        async def carry_out() -> None:
            async with Client(self.bus, role="worker") as bus, bus.lease(1) as leases:
                async for task in leases:
                    seen.append(msgspec.msgpack.decode(task.task))
                    if fail:
                        await leases.fail(task, "Traceback: …\nLookupError: no such table", retryable=False)
                    else:
                        await leases.done(task, 0.5)
                    if len(seen) == tasks:
                        leases.stop()

        anyio.run(carry_out)
        return seen


def test_tasks_are_submitted_carried_out_and_waited_for(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"q": "1 + 1"}\n\n{"q": "2 + 2"}\n', encoding="utf-8")
    ids = run("submit", "--file", str(tmp_path / "tasks.jsonl"), "--id", "sum", "--label", "split=test").split()
    assert (run.code, ids) == (0, ["sum-0", "sum-1"])
    assert run.work(tasks=2) == [{"q": "1 + 1"}, {"q": "2 + 2"}]
    lines = sorted(run("wait", *ids).splitlines())
    assert (run.code, lines) == (0, [f"sum-{n}  succeeded  attempt 1  reward 0.5" for n in range(2)])


def test_ids_are_read_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("submit", "--task", "1", "--id", "r-1")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"r-1\nr-1\n")))
    assert run("cancel", "-") == "1 cancelled\n"
    assert "r-1  cancelled" in run("wait", "r-1") and run.code == 1


def test_a_task_submitted_again_with_its_key_is_the_same_rollout(run: Run) -> None:
    first = json.loads(run("submit", "--task", '"again"', "--idempotency-key", "nightly", "--json"))
    again = json.loads(run("submit", "--task", '"again"', "--idempotency-key", "nightly", "--json"))
    assert (first["fresh"], again["fresh"]) == (1, 0)
    assert first["rollout_ids"] == again["rollout_ids"]


def test_dead_letters_are_listed_shown_replayed_and_purged(run: Run) -> None:
    run("submit", "--task", '{"q": 1}', "--task", '{"q": 2}', "--id", "r")
    run.work(fail=True, tasks=2)
    listed = [json.loads(line) for line in run("dead", "list", "--json").splitlines()]
    assert [letter["rollout_id"] for letter in listed] == ["r-0", "r-1"]
    assert "LookupError: no such table" in run("dead", "list")
    shown = run("dead", "show", "r-0")
    assert '{"q": 1}' in shown and "Traceback" in shown
    assert json.loads(run("status", "--json"))["dead"] == 2

    (again,) = run("dead", "replay", "r-0").split()
    assert run.work() == [{"q": 1}]
    assert again in run("wait", again) and run.code == 0
    assert run("dead", "purge", "--all") == "1 purged\n"
    assert run("dead", "list") == "no dead letters\n"


def test_a_broker_that_drains_hands_nothing_out_until_it_may_again(run: Run) -> None:
    assert run("drain") == "draining; 0 attempts are under way\n"
    run("submit", "--task", "1", "--id", "r-1")
    assert json.loads(run("status", "--json"))["draining"] is True
    assert run("resume") == "resumed\n"
    assert run.work() == [1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["submit"], "there is nothing to submit"),
        (["submit", "--task", "2 + 3"], "this is not JSON"),
        (["submit", "--file", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["submit", "--file", "bad.jsonl"], "bad.jsonl: line 2 is not JSON"),
        (["submit", "--task", "1", "--label", "x"], "write key=value"),
        (["dead", "replay"], "their ids, or --all"),
        (["dead", "purge", "r-1", "--all"], "their ids, or --all"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("1\n{\n", encoding="utf-8")
    run(*argv)
    assert run.code == 2 and says in run.err


def test_a_rollout_that_nobody_knows_is_told(run: Run) -> None:
    run("wait", "r-9")
    assert run.code == 2 and "r-9" in run.err
    run("dead", "show", "r-9")
    assert run.code == 2 and "knows no rollout 'r-9'" in run.err


def test_waiting_can_be_limited(run: Run) -> None:
    run("submit", "--task", "1", "--id", "r-1")
    run("wait", "r-1", "--limit", "0.1")
    assert run.code == 1 and "r-1 among them" in run.err


def test_a_key_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["cancel", "r-1", "--bus", NOWHERE, "--key", str(tmp_path / "admin.key")])
    assert caught.value.code == 2 and "admin.key" in capsys.readouterr().err


def test_a_run_says_where_its_broker_is_and_which_key_it_wants(
    bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_run(path: Path) -> RunFile:  # other packages' sections have required keys of their own
        return config.load(path, config.BUS_SECTIONS)

    monkeypatch.setattr(cli_shared, "load_run", load_run)
    (tmp_path / "run.toml").write_text(f'[run]\nname = "test"\n[broker]\nbind = "{bus}"\n', encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        cli.main(["drain", "--run", str(tmp_path / "run.toml"), "--json"])
    assert not caught.value.code and json.loads(capsys.readouterr().out) == {"draining": True, "held": 0}
    with (tmp_path / "run.toml").open("a", encoding="utf-8") as file:
        file.write(f'keys = "{tmp_path / "keys"}"\n')
    with pytest.raises(SystemExit) as caught:
        cli.main(["resume", "--run", str(tmp_path / "run.toml")])
    assert caught.value.code == 2 and f"cannot read the key {tmp_path}/keys/admin.key" in capsys.readouterr().err
