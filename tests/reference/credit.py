"""Slow twin of lightning_bus.adapters.credit: the formulas, a turn at a time, on plain lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

# A rollout is (group, states, own rewards, final reward).
Rollout = tuple[str, Sequence[str], Sequence[float], float]


def turn_advantages(rollouts: Sequence[Rollout], relevance: float, gamma: float) -> list[list[float]]:
    """MT-GRPO for any number of turns: (own − mean own) + share · (R − mean R), groups of one at 0."""
    result: list[list[float]] = []
    for group, _, own, final in rollouts:
        peers = [one for one in rollouts if one[0] == group]
        mean_final = fmean(one[3] for one in peers)
        mean_own = fmean(fmean(one[2]) if one[2] else 0.0 for one in peers)
        row: list[float] = []
        for t, earned in enumerate(own):
            share = 1.0 if t == len(own) - 1 else relevance * gamma ** (len(own) - 1 - t)
            row.append((earned - mean_own) + share * (final - mean_final) if len(peers) > 1 else 0.0)
        result.append(row)
    return result


def return_from(own: Sequence[float], final: float, t: int, gamma: float) -> float:
    last = len(own) - 1
    return math.fsum(gamma ** (k - t) * own[k] for k in range(t, len(own))) + gamma ** (last - t) * final


def leave_one_out(rollouts: Sequence[Rollout], gamma: float) -> list[list[float]]:
    result: list[list[float]] = []
    for i, (group, states, own, final) in enumerate(rollouts):
        row: list[float] = []
        for t, state in enumerate(states):
            there: list[float] = []
            first: list[float] = []
            for j, (other_group, other_states, other_own, other_final) in enumerate(rollouts):
                if j == i or other_group != group or not other_states:
                    continue
                first.append(return_from(other_own, other_final, 0, gamma))
                visits = [
                    return_from(other_own, other_final, k, gamma) for k, s in enumerate(other_states) if s == state
                ]
                if visits:
                    there.append(fmean(visits))
            mine = return_from(own, final, t, gamma)
            if there:
                row.append(mine - fmean(there))
            elif t:
                row.append(row[t - 1])
            else:
                row.append(mine - fmean(first) if first else 0.0)
        result.append(row)
    return result
