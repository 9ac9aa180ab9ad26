"""Agents: found by name, called with what they ask for, their return values judged."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from lightning_bus import AgentError
from workers.agent import agent_of, load_agent, reward_from
from workers.context import RolloutContext

CONTEXT = RolloutContext("r-1", 2, "http://gateway/v1", "key", "g", {"phase": "rl"})

SOURCE = """
number = 3

def agent(task):
    return 1.0

class Holder:
    @staticmethod
    def agent(task):
        return 2.0

def wants_more(task, weather):
    return weather
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory."""
    name = "an_agent_of_the_tests"
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import not_a_module_at_all\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield name
    for name in ("an_agent_of_the_tests", "needs_more", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.anyio
async def test_an_agent_is_found_in_the_current_directory(module: str) -> None:
    assert await load_agent(f"{module}:agent").run({}, CONTEXT) == 1.0
    assert await load_agent(f"{module}:Holder.agent").run({}, CONTEXT) == 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_anywhere:agent", "there is no module no_such_module_anywhere"),
        ("an_agent_of_the_tests.sub:agent", "there is no module an_agent_of_the_tests.sub|is not a package"),
        ("an_agent_of_the_tests:missing", "has no missing"),
        ("an_agent_of_the_tests:number", "is a int, which cannot be called"),
        ("an_agent_of_the_tests:wants_more", "wants a parameter 'weather', which no worker has"),
        ("an_agent_of_the_tests", "does not name an agent. Name it as module:function"),
        ("needs_more:agent", "importing needs_more needs not_a_module_at_all, which is not installed"),
        ("broken:agent", "importing broken raised ZeroDivisionError"),
    ],
)
def test_a_name_that_is_no_agent_says_why(module: str, name: str, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        load_agent(name)


@pytest.mark.anyio
async def test_an_agent_gets_what_it_names_and_nothing_else() -> None:
    seen: list[Any] = []

    def plain(task: Any) -> None:
        seen.append(task)

    def endpoint(*, api_key: str, base_url: str, temperature: float = 0.5) -> None:
        seen.append((api_key, base_url, temperature))

    async def context(rollout: RolloutContext, /) -> None:
        seen.append((rollout.rollout_id, rollout.attempt, rollout.group, rollout.labels))

    def everything(**kwargs: Any) -> None:
        seen.append(sorted(kwargs))

    for agent in (plain, endpoint, context, everything):
        await agent_of(agent).run({"q": 1}, CONTEXT)
    assert seen == [
        {"q": 1},
        ("key", "http://gateway/v1", 0.5),
        ("r-1", 2, "g", {"phase": "rl"}),
        ["api_key", "base_url", "rollout", "task"],
    ]


@pytest.mark.anyio
async def test_async_agents_run_in_the_loop_and_sync_ones_beside_it() -> None:
    threads: list[threading.Thread] = []

    async def waits() -> None:
        await anyio.lowlevel.checkpoint()
        threads.append(threading.current_thread())

    def blocks() -> None:
        threads.append(threading.current_thread())

    class Waits:
        async def __call__(self) -> float:
            await waits()
            return 1.0

    assert await agent_of(waits).run(None, CONTEXT) is None
    assert await agent_of(blocks).run(None, CONTEXT) is None
    assert await agent_of(Waits()).run(None, CONTEXT) == 1.0
    assert await agent_of(lambda: Waits()()).run(None, CONTEXT) == 1.0
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, False, True, True]


@pytest.mark.anyio
async def test_what_an_agent_raises_passes_through() -> None:
    def broken() -> None:
        raise LookupError("no such thing")

    def leaves() -> None:
        sys.exit(3)

    with pytest.raises(LookupError, match="no such thing"):
        await agent_of(broken).run(None, CONTEXT)
    with pytest.raises(SystemExit):
        await agent_of(leaves).run(None, CONTEXT)


@pytest.mark.anyio
async def test_a_sync_agent_that_hangs_can_be_left_behind() -> None:
    goes_on = threading.Event()
    with anyio.move_on_after(0.05) as scope:
        await agent_of(lambda: goes_on.wait()).run(None, CONTEXT)
    assert scope.cancelled_caught
    goes_on.set()


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.int64(2), Fraction(1, 2), -3])
def test_numbers_are_rewards(value: Any) -> None:
    reward = reward_from(value, "agent")
    assert reward == float(value) and type(reward) is float
    assert reward_from(None, "agent") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.0", "returned '1.0' of type str"),
        ({"reward": 1}, "of type dict. Return its reward, a number"),
        ((1.0, 2.0), "of type tuple"),
        (float("nan"), "returned nan. A reward is a finite number"),
        (float("inf"), "returned inf"),
        (10**400, "finite number"),
        (1j, "of type complex"),
    ],
)
def test_anything_else_is_refused_by_value_and_type(value: Any, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        reward_from(value, "agent")
