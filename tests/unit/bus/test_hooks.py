"""Reward hooks in real processes: what each way of going wrong becomes."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.adapters import FinishedRollout, Reward
from lightning_bus.errors import ConfigError
from lightning_bus.rescoring import Dropped, Given, HookPool
from lightning_bus.rescoring.answers import Answer, answer_from
from tests.recorded_agent import Play

pytestmark = pytest.mark.skipif(os.name == "nt", reason="hook processes need process groups")

HOOKS = """
import asyncio, os, subprocess, sys, time
from lightning_bus.adapters import Reward

def scored(rollout):
    print("a hook may print")
    return rollout.task["answer"] + len(rollout.spans)

async def later(rollout):
    await asyncio.sleep(0)
    return [Reward(rollout.spans[0].span_id, 0.5, "judge"), (b"", 1, "all")]

together = []

async def waits_for_the_others(rollout):
    together.append(asyncio.Event())
    if len(together) == 3:
        for event in together:
            event.set()
    await together[-1].wait()
    if rollout.rollout_id == "r-1":
        raise KeyError("no such thing")
    return 1.0

async def never_returns(rollout):
    if rollout.rollout_id == "r-1":
        await asyncio.sleep(1000)
    return 1.0

def raises(rollout):
    if rollout.rollout_id == "r-1":
        raise KeyError("no such thing")
    return 1.0

def hangs(rollout):
    if rollout.rollout_id == "r-1" and not os.path.exists("started.pid"):
        with open("child.pid", "w") as file:
            file.write(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid))
        os.rename("child.pid", "started.pid")
    if rollout.rollout_id == "r-1":
        time.sleep(1000)
    return 1.0

def dies(rollout):
    if rollout.rollout_id == "r-1":
        os._exit(0)
    return 1.0

def leaves(rollout):
    sys.exit("enough")

def eats(rollout):
    return float(len(bytearray(1 << 40)) if rollout.rollout_id == "r-1" else 1)

def reads(rollout):
    return float(len(sys.stdin.read()))

NOT_CALLABLE = 3
"""


def rollouts(count: int = 3) -> list[FinishedRollout]:
    made: list[FinishedRollout] = []
    for number in range(count):
        play = Play(rollout_id=f"r-{number}")
        play.say("x")
        ended = play.finish()
        made.append(
            FinishedRollout(**{**{f: getattr(ended, f) for f in ended.__slots__}, "task_body": b"\x81\xa6answer\x07"})
        )
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_hooks.py").write_text(textwrap.dedent(HOOKS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(hook: str, asked: list[FinishedRollout] | None = None, **how: Any) -> list[Answer]:
    async def run() -> list[Answer]:
        async with HookPool(f"my_hooks:{hook}", **how) as hooks:
            return await hooks.ask(rollouts() if asked is None else asked)

    return anyio.run(run)


def ask_one_that_takes_too_long(hook: str, began: Callable[[], bool] = lambda: True) -> None:
    """The second of three rollouts never comes back: it is dropped, and the others are answered.

    On a machine that stands still the others may take too long as well; then there is more time.
    """
    for limit_s in (2.0, 8.0, 32.0):
        first, second, third = ask(hook, limit_s=limit_s)
        assert second == Dropped(f"hook took more than {limit_s:g} s")
        if first == third == Given(1.0) and began():
            return
    pytest.fail(f"the others are dropped, too: {first}, {third}")


def test_a_hook_sees_task_and_spans_and_its_numbers_come_back_in_order(here: Path) -> None:
    assert ask("scored") == [Given(8.0)] * 3
    assert ask("scored", []) == []


def test_an_async_hook_may_reward_single_spans(here: Path) -> None:
    (first, *_) = ask("later")
    span_id = rollouts()[0].spans[0].span_id
    assert first == Given(None, [Reward(span_id, 0.5, "judge"), Reward(b"", 1.0, "all")])


def test_async_hooks_of_one_process_work_at_the_same_time(here: Path) -> None:
    assert ask("waits_for_the_others") == [Given(1.0), Dropped("hook raised KeyError", "'no such thing'"), Given(1.0)]


def test_an_async_hook_that_never_returns_holds_nobody_up_for_ever(here: Path) -> None:
    ask_one_that_takes_too_long("never_returns")


def test_several_processes_answer_in_order(here: Path) -> None:
    asked = rollouts(100)
    assert ask("scored", asked, processes=3) == [Given(8.0)] * 100


@pytest.mark.parametrize(
    ("hook", "how", "reason"),
    [
        ("raises", {}, "hook raised KeyError"),
        ("dies", {}, "hook ended its process"),
        ("eats", {"memory_bytes": 4 << 30}, "hook raised MemoryError"),
    ],
)
def test_a_rollout_on_which_the_hook_fails_is_dropped_and_the_others_are_not(
    here: Path, hook: str, how: dict[str, Any], reason: str
) -> None:
    first, second, third = ask(hook, **how)
    assert (first, third) == (Given(1.0), Given(1.0))
    assert isinstance(second, Dropped)
    assert second.reason == reason


def test_what_hangs_is_killed_with_all_that_it_started(here: Path) -> None:
    started = here / "started.pid"
    ask_one_that_takes_too_long("hangs", started.exists)
    pid = int(started.read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_leaving_by_sys_exit_is_no_reward(here: Path) -> None:
    assert ask("leaves", rollouts(1)) == [Dropped("hook ended its process")]


def test_a_hook_cannot_eat_the_rollouts_that_wait_for_it(here: Path) -> None:
    assert ask("reads") == [Given(0.0)] * 3


@pytest.mark.parametrize(
    ("hook", "wrong"),
    [
        ("missing", "no attribute 'missing'"),
        ("NOT_CALLABLE", "not a function"),
        ("", "not of the form MODULE:FUNCTION"),
    ],
)
def test_a_hook_that_cannot_be_loaded_is_the_callers_mistake(here: Path, hook: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        ask(hook)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (1, Given(1.0)), (True, Given(1.0)), (np.float32(0.5), Given(0.5)), (np.array(2.0), Given(2.0)),
        ([], Given(None, [])), (None, Dropped("hook returned None")),
    ],
)  # fmt: skip
def test_what_counts_as_a_reward(value: Any, answer: Answer) -> None:
    assert answer_from(value) == answer


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "1.0", b"1", {"reward": 1.0}, np.array([1.0, 2.0]), 10**400, [1.0], [("id", 1.0, "x")],
     [(b"id", float("nan"), "x")], [(b"id", 1.0)], [(b"id", 1.0, 3)], [None]],
)  # fmt: skip
def test_what_is_no_reward_is_a_drop_that_says_what_it_was(value: Any) -> None:
    answer = answer_from(value)
    assert isinstance(answer, Dropped)
    assert answer.reason.startswith("hook returned")
    assert answer.detail


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.binary() | st.integers(), st.lists))
def test_any_value_is_an_answer(value: Any) -> None:
    assert isinstance(answer_from(value), Answer)
