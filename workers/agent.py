"""The user's agent: found by name, called with what it asks for, its return value judged.

What always holds: a mistake in the agent's own contract (a name that cannot be imported, a parameter nobody can
fill, a return value that is no reward) is an AgentError that names the value and the way out, and is final: trying
again would only repeat it. Whatever the agent raises itself passes through unchanged.
"""

from __future__ import annotations

import contextvars
import importlib
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel

from lightning_bus import AgentError
from workers.context import RolloutContext

OFFERED = ("task", "base_url", "api_key", "rollout")
_HOW = "Name it as module:function, for example examples.calc.agent:agent."


def load_agent(name: str) -> Agent:
    """Return the agent that "module:function" names; the current directory is searched first.

    Raises AgentError when there is no such module or function, or it wants arguments that no worker has.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise AgentError(f"{name!r} does not name an agent. {_HOW}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        missing = exc.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise AgentError(
                f"agent {name}: there is no module {missing} in {here} or among the installed packages. "
                "Start the worker in the directory that holds it, or install it."
            ) from exc
        raise AgentError(f"agent {name}: importing {module_name} needs {missing}, which is not installed.") from exc
    except Exception as exc:
        raise AgentError(f"agent {name}: importing {module_name} raised {type(exc).__name__}: {exc}") from exc
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as exc:
            raise AgentError(f"agent {name}: {module_name} has no {path}. {_HOW}") from exc
    if not callable(found):
        raise AgentError(f"agent {name}: {path} is a {type(found).__name__}, which cannot be called. {_HOW}")
    return agent_of(found, name)


def agent_of(function: Callable[..., Any], name: str = "") -> Agent:
    """Return a callable as an agent. Raises AgentError when it wants arguments that no worker has."""
    name = name or getattr(function, "__qualname__", repr(function))
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as exc:
        raise AgentError(f"agent {name}: its parameters cannot be read ({exc}). Wrap it in a function.") from exc
    positional: list[str] = []
    keywords: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            keywords += [offer for offer in OFFERED if offer not in (*positional, *keywords)]
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.name in OFFERED:
            (positional if parameter.kind is parameter.POSITIONAL_ONLY else keywords).append(parameter.name)
        elif parameter.default is parameter.empty:
            raise AgentError(
                f"agent {name} wants a parameter {parameter.name!r}, which no worker has. "
                f"An agent may take {', '.join(OFFERED)}; give the others defaults."
            )
    called: Any = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    waits = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
    return Agent(name, function, tuple(positional), tuple(keywords), waits)


@dataclass(frozen=True, slots=True)
class Agent:
    """A function that carries out one task."""

    name: str
    function: Callable[..., Any]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    is_async: bool

    async def run(self, task: Any, rollout: RolloutContext) -> float | None:
        """Carry out one task and return its reward.

        An async agent runs in this event loop and can be cancelled. A sync one runs in a thread of its own, which
        cannot: on cancellation it is left to finish in vain and its result is dropped.
        """
        offers = {"task": task, "base_url": rollout.base_url, "api_key": rollout.api_key, "rollout": rollout}
        args = [offers[name] for name in self.positional]
        kwargs = {name: offers[name] for name in self.keywords}
        if self.is_async:
            value = await self.function(*args, **kwargs)
        else:
            value = await _in_thread(lambda: self.function(*args, **kwargs), self.name)
            if inspect.isawaitable(value):  # a sync wrapper around an async agent
                value = await value
        return reward_from(value, self.name)


def reward_from(value: Any, name: str) -> float | None:
    """Return an agent's return value as a reward. Raises AgentError when it is none."""
    if value is None:
        return None
    if not isinstance(value, Real):
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise AgentError(
            f"agent {name} returned {shown} of type {type(value).__name__}. "
            "Return its reward, a number (int, float or bool), or None when it has none."
        )
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise AgentError(
            f"agent {name} returned {value!r:.80}. A reward is a finite number; return None when there is none."
        )
    return reward


async def _in_thread(function: Callable[[], Any], name: str) -> Any:
    # A thread of our own and a daemon: pools join their threads when the process ends, and an agent that hangs
    # would keep a worker that was told to stop alive for ever.
    done = anyio.Event()
    token = anyio.lowlevel.current_token()
    outcome: list[Any] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            outcome[:] = [context.run(function), None]
        except BaseException as exc:  # sys.exit() in an agent ends the attempt, not the worker
            outcome[:] = [None, exc]
        try:
            anyio.from_thread.run_sync(done.set, token=token)
        except anyio.RunFinishedError:
            pass  # abandoned, and the worker has ended since

    threading.Thread(target=work, name=f"agent {name}", daemon=True).start()
    await done.wait()
    value, error = outcome
    if error is not None:
        raise error
    return value
