"""How a supervised run ends badly: in the daemon's own words, with the way to go on, and not after an hour of restarts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest

from lightning_bus import supervisor as module
from lightning_bus.daemon import load_run
from lightning_bus.supervisor import Daemon, DaemonFailed, Supervisor, prepare

RUN_TOML = """
[run]
name = "r"
[policy]
model = "unused"
[train]
tasks = "unused"
held_out = "unused"
"""


def run_of(directory: Path, source: str) -> tuple[DaemonFailed, list[str]]:
    """Supervise a trainer that does this until it is given up; return why, and the events on the way."""
    (directory / "logs").mkdir()
    events: list[str] = []
    train = Daemon("train", "train", [sys.executable, "-S", "-c", source])
    with pytest.raises(DaemonFailed) as caught:
        anyio.run(Supervisor([train], directory, events.append).run)
    return caught.value, events


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)


def test_an_error_is_told_whole_and_with_the_way_to_go_on(tmp_path: Path) -> None:
    source = "import sys; sys.exit(print('noise\\nlightning-bus: first line\\nsecond line', file=sys.stderr) or 2)"
    failure, _ = run_of(tmp_path, source)
    assert str(failure) == (
        "train ended with exit code 2:\nfirst line\nsecond line\n"
        f"When that is mended, go on with: lightning-bus up {tmp_path}"
    )


def test_a_disk_so_full_that_nobody_could_say_so_is_told_all_the_same(tmp_path: Path) -> None:
    failure, _ = run_of(tmp_path, "raise SystemExit(74)")
    assert f"The disk refused data for {tmp_path}. " in str(failure)
    assert "MB are free on that disk. Free space and start again." in str(failure)
    assert failure.exit_code == 74


def test_an_error_that_every_restart_repeats_is_given_up_and_each_time_told(tmp_path: Path) -> None:
    failure, events = run_of(tmp_path, "raise KeyError('column')")
    assert events == (module.CRASHES_MAX - 1) * ["train died (exit code 1: KeyError: 'column'), restarting"]
    assert "train exit code 1, 5 times in a row. The end of" in str(failure)
    assert "KeyError: 'column'" in str(failure)


def test_kills_are_nobodys_error_and_do_not_add_up(tmp_path: Path) -> None:
    source = (
        "import os, signal, sys; lives = len(os.listdir('lives')); open(f'lives/{lives}', 'w');"
        "sys.exit(2) if lives == 7 else sys.exit(1) if lives % 2 else os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "lives").mkdir()
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        failure, events = run_of(tmp_path, source)
    finally:
        os.chdir(here)
    assert failure.exit_code == 2
    assert len(events) == 7


def test_a_key_changed_on_resume_reaches_the_daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN_TOML)
    free = {
        "broker": {"bind": "tcp://127.0.0.1:0"},
        "gateway": {"bind": "127.0.0.1:0"},
        "serve": {"bind": "127.0.0.1:0"},
    }
    directory = prepare(load_run(Path("run.toml"), free))
    began_ns = (directory / "run.toml").stat().st_mtime_ns
    prepare(load_run(directory), resume=True)
    assert (directory / "run.toml").stat().st_mtime_ns == began_ns, "nothing changed, so nothing is written"
    prepare(load_run(directory, {"broker": {"max_attempts": 9}}), resume=True)
    sections = load_run(directory).sections
    assert (sections["broker"].max_attempts, sections["broker"].bind) == (9, "tcp://127.0.0.1:0")  # pyright: ignore[reportAttributeAccessIssue]
    assert not list(directory.glob(".*"))
