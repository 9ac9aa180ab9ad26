"""Where the time of one step went: what the trainer did, and what it waited for.

    phases = Phases()
    with phases.timed("wait_rollouts_s"):
        …
    phases.line()     {"wait_rollouts_s": 1.5, …, "iteration_s": 4.0, "idle_share": 0.375}

A step that starves shows as `idle_share`: the share of an iteration in which the trainer could do nothing, because
rollouts (`wait_rollouts_s`) or the first call under the newest weights (`wait_version_s`) had not come yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_bus import monotonic_s

WAITS = ("wait_rollouts_s", "wait_version_s")  # in these the trainer is idle


class Phases:
    """A stopwatch for one iteration, which begins when this is made."""

    def __init__(self, clock: Callable[[], float] = monotonic_s) -> None:
        self._clock = clock
        self._started_s = clock()
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what is done inside to the phase of that name."""
        started_s = self._clock()
        try:
            yield
        finally:
            self._spent_s[name] += self._clock() - started_s

    def line(self) -> dict[str, float]:
        """Return seconds by phase so far, of the whole iteration, and the share of it that was waiting."""
        iteration_s = self._clock() - self._started_s
        waited_s = sum(self._spent_s[name] for name in WAITS)
        share = waited_s / iteration_s if iteration_s > 0 else 0.0
        return {**self._spent_s, "iteration_s": iteration_s, "idle_share": share}
