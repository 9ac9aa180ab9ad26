"""Which task comes next: by default each in turn; with a curriculum, those that the policy sometimes succeeds at.

A task that always succeeds, or never, gives a group of equal rewards, which teaches nothing. A running success rate of
each task sorts them into three pools:

    too hard  rate < success_min          learnable          too easy  rate > success_max
    └──────────────── tried again now and then: `explore` of the choices ────────────────┘

What comes next depends on the counts given and the number of the group, on nothing else. So a trainer that resumes
from a checkpoint, which holds the counts, chooses what it would have chosen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

Pool = Literal["untried", "too_hard", "learnable", "too_easy"]
Rates = dict[str, list[float]]  # task → [running success rate, groups seen]

MEMORY_GROUPS = 4  # a rate is about the last so many groups of a task: the policy that older ones tell of is gone


def update(rates: Rates, task: str, rewards: Iterable[float], *, success: float) -> None:
    """Take in how a group of this task went: the share of its rewards that are at least `success`. None: no change."""
    values = [float(reward >= success) for reward in rewards]
    if not values:
        return
    rate, seen = rates.get(task, [0.0, 0.0])
    weight = 1 / min(seen + 1, MEMORY_GROUPS)
    rates[task] = [rate + weight * (sum(values) / len(values) - rate), seen + 1]


def pool_of(rates: Mapping[str, list[float]], task: str, bounds: tuple[float, float]) -> Pool:
    """Return the pool that a task is in."""
    if task not in rates:
        return "untried"
    rate, _ = rates[task]
    return "too_hard" if rate < bounds[0] else "too_easy" if rate > bounds[1] else "learnable"


def choose(
    rates: Mapping[str, list[float]], group: int, tasks: int, *, bounds: tuple[float, float], explore: float
) -> int:
    """Return the index of the task for the group of this number.

    bounds   (success_min, success_max) of what is learnable
    explore  share of choices among all other tasks, untried ones first; all choices where nothing is learnable
    """
    pools = [pool_of(rates, str(task), bounds) for task in range(tasks)]
    learnable = [task for task, pool in enumerate(pools) if pool == "learnable"]
    untried = [task for task, pool in enumerate(pools) if pool == "untried"]
    others = untried or [task for task, pool in enumerate(pools) if pool != "learnable"]
    exploring = not learnable or (_share("explore", group) < explore and bool(others))
    among = others if exploring else learnable
    return among[int(_share("task", group) * len(among))]


def pool_sizes(rates: Mapping[str, list[float]], tasks: int, bounds: tuple[float, float]) -> dict[str, int]:
    """Return how many tasks each pool holds, for the log."""
    return dict(Counter(pool_of(rates, str(task), bounds) for task in range(tasks)))


def _share(what: str, group: int) -> float:
    """Return a number in [0, 1) that looks random and is always the same for the same group."""
    return int.from_bytes(hashlib.blake2b(f"{what}-{group}".encode(), digest_size=4).digest(), "little") / 2**32
