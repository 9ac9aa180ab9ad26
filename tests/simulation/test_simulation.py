"""Histories without a broken promise, and that they are what they claim to be: full of harm, and the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import anyio
import pytest

from tests.simulation import run
from tests.simulation.bugs import BUGS
from tests.simulation.oracle import Violation
from tests.simulation.virtual_time import START_S, NothingWillEverHappen, virtual_loop
from tests.simulation.virtual_time import run as run_in
from tests.simulation.world import simulate

ROOT = Path(__file__).resolve().parent.parent.parent
HARM = [
    "broker ended: StorageError", "cut", "kill broker", "kill client", "killed: after commit", "killed: before commit",
    "killed: between replies", "killed: decided", "move wall clock", "pause broker", "pause client", "silence", "stall",
    "stop broker",
]  # fmt: skip
OUTCOMES = [
    "append: BrokenError", "conflict", "done", "drained", "fail", "fenced", "final", "lost", "nack", "purged",
    "release", "replayed", "span fenced", "unreported", "waited", "watched",
]  # fmt: skip


def test_every_promise_holds_in_a_hundred_histories_and_all_harm_was_done() -> None:
    events: Counter[str] = Counter()
    for seed in range(100):
        events.update(simulate(seed).events)
    assert [name for name in HARM + OUTCOMES if not events[name]] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_promise_holds_in_two_thousand_histories() -> None:
    for seed in range(2000):
        simulate(seed)


def test_a_seed_plays_the_same_in_every_process() -> None:
    """Strings hash differently in each process, and sets order their members by that."""
    program = (
        "import sys; from tests.simulation.world import simulate; print([simulate(s).fingerprint for s in range(8)])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True, timeout=280,
        ).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    assert told == {f"{[simulate(seed).fingerprint for seed in range(8)]}\n"}


def test_a_failing_seed_names_itself_and_fails_again() -> None:
    bug = next(bug for bug in BUGS if bug.name == "ack_before_commit")
    told: list[str] = []
    with bug.planted() as server:
        for _ in range(2):
            with pytest.raises(Violation, match="^seed 0, ") as caught:
                simulate(0, server=server)
            told.append(str(caught.value))
    assert told[0] == told[1]
    assert "python -m tests.simulation.run --seed 0 -v" in told[0]


def test_a_history_can_be_read() -> None:
    lines: list[str] = []
    outcome = simulate(0, note=lines.append)
    assert outcome == simulate(0)
    text = "\n".join(lines)
    for part in ("──► ", "◄── ", "Append(parts=", "  disk 0: ", "all harm ends here"):
        assert part in text


def test_the_runner_says_how_many_histories_held(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--seeds", "3"]) == 0
    assert "3 seeds in" in capsys.readouterr().out


def test_the_runner_prints_a_failing_seed_and_stops(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = next(bug for bug in BUGS if bug.name == "ack_before_commit")
    with bug.planted() as server:
        monkeypatch.setattr(run, "simulate", lambda seed: simulate(seed, server=server))
        assert run.main(["--seeds", "3"]) == 1
    told = capsys.readouterr()
    assert "FAILED seed 0, " in told.err
    assert "1 seeds in" in told.out


def test_waiting_takes_no_time_and_for_ever_is_an_error() -> None:
    async def wait() -> None:
        await anyio.sleep(3600)
        await anyio.Event().wait()

    with virtual_loop() as loop:
        with pytest.raises(NothingWillEverHappen):
            run_in(loop, wait)
        assert loop.time() == START_S + 3600
