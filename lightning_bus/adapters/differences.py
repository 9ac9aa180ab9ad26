"""Two scorings of the same rollouts, and what is different between them. Pure.

Groups come one after the other and are forgotten once they are counted, so memory does not grow with the run. Ranks are
compared within groups, for nothing else is what training sees: a scoring that adds 1 to every reward changes all rewards
and no rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from lightning_bus.adapters.rewards import SourceReport

SHOWN = 10  # rollouts and groups that are kept to be shown: those that changed most
CHANGE_MIN = 1e-9  # below that two returns are the same number, summed in another order


class Scoring(NamedTuple):
    """What one rollout came to under one scoring. total None: it has no return, or was dropped."""

    total: float | None
    by_source: Mapping[str, float]


class Compared(NamedTuple):
    """One rollout under both."""

    rollout_id: str
    group: str
    before: Scoring
    after: Scoring

    @property
    def change(self) -> float:
        """How far its return moved; infinite where it is known under one of them only."""
        before, after = self.before.total, self.after.total
        if before is None or after is None:
            return 0.0 if before is after else math.inf
        return abs(after - before) if abs(after - before) >= CHANGE_MIN else 0.0


class GroupChange(NamedTuple):
    """One group: its mean return under both, over the rollouts that have one."""

    group: str
    rollouts: int
    before: float | None
    after: float | None
    swapped: int  # pairs of rollouts that stand the other way round
    best_changed: bool  # another rollout is the best now

    @property
    def change(self) -> float:
        if self.before is None or self.after is None:
            return 0.0 if self.before is self.after else math.inf
        return abs(self.after - self.before)


@dataclass(slots=True)
class Differences:
    """Add every group once; then read it."""

    rollouts: int = 0
    changed: int = 0  # whose return is another
    gained: int = 0  # that have a return only now
    lost: int = 0  # that had one only before
    groups: int = 0
    pairs: int = 0  # of rollouts of a group that have returns under both
    pairs_swapped: int = 0  # one better before, the other after
    pairs_tied: int = 0  # that differed and do not any more
    pairs_untied: int = 0  # that did not differ and do now
    groups_best_changed: int = 0
    informative_before: int = 0  # groups whose returns are not all equal: those that teach
    informative_after: int = 0
    rollouts_most: list[tuple[float, int, Compared]] = field(default_factory=list[tuple[float, int, Compared]])
    groups_most: list[tuple[float, int, GroupChange]] = field(default_factory=list[tuple[float, int, GroupChange]])
    _reports: dict[bool, SourceReport] = field(default_factory=lambda: {False: SourceReport(), True: SourceReport()})

    def add_group(self, group: str, rollouts: Sequence[Compared]) -> None:
        """Count one whole group."""
        self.groups += 1
        for one in rollouts:
            self.rollouts += 1
            change = one.change
            self.changed += change > 0
            self.gained += one.before.total is None and one.after.total is not None
            self.lost += one.before.total is not None and one.after.total is None
            self._reports[False].add(one.before.total, one.before.by_source)
            self._reports[True].add(one.after.total, one.after.by_source)
            if change:
                _keep(self.rollouts_most, change, self.rollouts, one)
        known = [
            (one.before.total, one.after.total)
            for one in rollouts
            if one.before.total is not None and one.after.total is not None
        ]
        swapped = 0
        for (before_a, after_a), (before_b, after_b) in combinations(known, 2):
            before, after = _sign(before_a - before_b), _sign(after_a - after_b)
            swapped += before * after < 0
            self.pairs_tied += bool(before) and not after
            self.pairs_untied += not before and bool(after)
        self.pairs += len(known) * (len(known) - 1) // 2
        self.pairs_swapped += swapped
        befores, afters = [before for before, _ in known], [after for _, after in known]
        best_changed = bool(known) and befores[afters.index(max(afters))] < max(befores) - CHANGE_MIN
        self.groups_best_changed += best_changed
        self.informative_before += _differ(one.before.total for one in rollouts)
        self.informative_after += _differ(one.after.total for one in rollouts)
        mean_before, mean_after = (
            _mean([total for total in totals if total is not None])
            for totals in ([one.before.total for one in rollouts], [one.after.total for one in rollouts])
        )
        change = GroupChange(group, len(rollouts), mean_before, mean_after, swapped, best_changed)
        if change.change or swapped:
            _keep(self.groups_most, change.change, self.groups, change)

    @property
    def most_changed(self) -> list[Compared]:
        """The rollouts that changed most, most first."""
        return [one for _, _, one in sorted(self.rollouts_most, reverse=True)]

    @property
    def most_changed_groups(self) -> list[GroupChange]:
        return [one for _, _, one in sorted(self.groups_most, reverse=True)]

    def mean(self, *, after: bool) -> float | None:
        """The mean return over the rollouts that have one."""
        return self._reports[after].mean

    def sources(self, *, after: bool) -> dict[str, tuple[float, float]]:
        """Return source → (mean value a rollout, mean share of a rollout's return), largest share first."""
        return self._reports[after].by_source()

    def facts(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "rollouts": self.rollouts, "changed": self.changed, "gained": self.gained, "lost": self.lost,
            "mean_before": self.mean(after=False), "mean_after": self.mean(after=True),
            "groups": self.groups, "informative_before": self.informative_before,
            "informative_after": self.informative_after, "groups_best_changed": self.groups_best_changed,
            "pairs": self.pairs, "pairs_swapped": self.pairs_swapped, "pairs_tied": self.pairs_tied,
            "pairs_untied": self.pairs_untied,
            "sources_before": _named(self.sources(after=False)), "sources_after": _named(self.sources(after=True)),
            "most_changed": [
                {
                    "rollout_id": one.rollout_id, "group": one.group, "before": one.before.total,
                    "after": one.after.total, "sources_before": dict(one.before.by_source),
                    "sources_after": dict(one.after.by_source),
                }
                for one in self.most_changed
            ],
            "most_changed_groups": [one._asdict() for one in self.most_changed_groups],
        }  # fmt: skip


def _keep(most: list[tuple[float, int, Any]], change: float, at: int, item: Any) -> None:
    """Keep an item if it is among the SHOWN that changed most; of equal ones the first."""
    heapq.heappush(most, (change, -at, item))
    if len(most) > SHOWN:
        heapq.heappop(most)


def _sign(value: float) -> int:
    return 0 if abs(value) < CHANGE_MIN else 1 if value > 0 else -1


def _differ(totals: Iterable[float | None]) -> bool:
    known = [total for total in totals if total is not None]
    return bool(known) and max(known) - min(known) >= CHANGE_MIN


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _named(sources: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {source: {"mean": value, "share": share} for source, (value, share) in sources.items()}
