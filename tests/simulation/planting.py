"""How a bug is planted and caught: a simulator that does not find them proves nothing.

Each bug is a generator that yields once, the bug being there; its value is the broker's loop to use, or None. It names
the promises that its discovery may be called, and within how many histories it must be found. `catch` plays seeds
until the oracle objects. `bugs` has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lightning_bus import messages as m
from lightning_bus.broker import core
from lightning_bus.broker.state import Context
from lightning_bus.records import Write
from tests.simulation.brokers import SimulatedServer
from tests.simulation.ledger import Violation
from tests.simulation.world import simulate

Planting = Callable[[], Generator[type[SimulatedServer] | None]]
Handler = Callable[[Context, Any], m.Body | None]


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug. `promises` are what its discovery may be called; `seeds_max` is how many histories may pass unharmed."""

    name: str
    promises: tuple[str, ...]
    seeds_max: int
    planted: Callable[[], Any]  # a context manager; its value is the broker's loop to use, or None


BUGS: list[Bug] = []


def bug(*promises: str, seeds_max: int) -> Callable[[Planting], None]:
    """Register a bug."""

    def register(planting: Planting) -> None:
        BUGS.append(Bug(planting.__name__, promises, seeds_max, contextmanager(planting)))

    return register


def catch(bug: Bug) -> tuple[int, str]:
    """Return the first seed that finds the bug, and what the oracle said. Raises AssertionError when none does.

    The oracle sees the log and the clients only: that a broker's memory looks odd harms nobody yet.
    """
    with bug.planted() as server:
        for seed in range(bug.seeds_max):
            try:
                simulate(seed, server=server, look_inside=False)
            except Violation as exc:
                return seed, str(exc)
    raise AssertionError(f"{bug.name} went unnoticed for {bug.seeds_max} seeds")


def handler_of(kind: type[m.Body]) -> Handler:
    """Return what the broker does with such a message."""
    return core._HANDLERS[kind]  # pyright: ignore[reportPrivateUsage]


@contextmanager
def handled_by(kind: type[m.Body], handler: Handler) -> Generator[None]:
    """Have the broker do this with such a message."""
    with mock.patch.dict(core._HANDLERS, {kind: handler}):  # pyright: ignore[reportPrivateUsage]
        yield


@contextmanager
def without_writes(forgotten: Callable[[Write], bool]) -> Generator[None]:
    """Have the broker write everything but these."""

    def filtered(effects: core.Effects) -> core.Effects:
        effects.writes = [write for write in effects.writes if not forgotten(write)]
        return effects

    def handle(*given: Any, **named: Any) -> core.Effects:
        return filtered(real_handle(*given, **named))

    def tick(*given: Any, **named: Any) -> core.Effects:
        return filtered(real_tick(*given, **named))

    real_handle, real_tick = core.handle, core.tick
    with mock.patch.object(core, "handle", handle), mock.patch.object(core, "tick", tick):
        yield


@contextmanager
def at_restart(harm: Callable[[core.BrokerState, float], None]) -> Generator[None]:
    """Have a broker that opens the log know something else; `harm` gets the state and the time."""

    def restore(*given: Any, **named: Any) -> core.BrokerState:
        state = real(*given, **named)
        harm(state, named["now_s"])
        return state

    real = core.restore
    with mock.patch.object(core, "restore", restore):
        yield


@contextmanager
def at_each_tick(harm: Callable[[core.BrokerState], None]) -> Generator[None]:
    """Do something to the broker's memory whenever it looks at the clock."""

    def tick(state: core.BrokerState, now_s: float, wall_ns: int) -> core.Effects:
        harm(state)
        return real(state, now_s, wall_ns)

    real = core.tick
    with mock.patch.object(core, "tick", tick):
        yield
