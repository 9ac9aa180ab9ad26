"""Slow twin of lightning_bus.adapters.advantages: one rollout at a time, in plain Python, from the formulas."""

import math
from collections.abc import Sequence


def _peers(rewards: Sequence[float], groups: Sequence[object], index: int, *, but_itself: bool = False) -> list[float]:
    return [rewards[k] for k in range(len(rewards)) if groups[k] == groups[index] and not (but_itself and k == index)]


def group_advantages(rewards: list[float], groups: list[object], *, scale: str = "none") -> list[float]:
    answers = []
    for index, reward in enumerate(rewards):
        peers = _peers(rewards, groups, index)
        mean = math.fsum(peers) / len(peers)
        advantage = reward - mean
        if scale == "std" and len(peers) > 1:
            std = math.sqrt(math.fsum((peer - mean) ** 2 for peer in peers) / (len(peers) - 1))
            advantage /= std + 1e-6
        answers.append(advantage if len(peers) > 1 else 0.0)
    return answers


def rloo_advantages(rewards: list[float], groups: list[object]) -> list[float]:
    answers = []
    for index, reward in enumerate(rewards):
        others = _peers(rewards, groups, index, but_itself=True)
        answers.append(reward - math.fsum(others) / len(others) if others else 0.0)
    return answers


def maxrl_advantages(rewards: list[float], groups: list[object]) -> list[float]:
    answers = []
    for index, reward in enumerate(rewards):
        peers = _peers(rewards, groups, index)
        mean = math.fsum(peers) / len(peers)
        answers.append((reward - mean) / mean if len(peers) > 1 and mean > 0 else 0.0)
    return answers


def reinforce_pp_advantages(rewards: list[float], groups: list[object] | None) -> list[float]:
    if groups is None:
        centred = [reward - math.fsum(rewards) / len(rewards) for reward in rewards]
        counted = list(range(len(rewards)))
    else:
        centred = [
            reward - math.fsum(peers) / len(peers)
            for index, reward in enumerate(rewards)
            for peers in [_peers(rewards, groups, index)]
        ]
        counted = [index for index in range(len(rewards)) if len(_peers(rewards, groups, index)) > 1]
    std = math.sqrt(math.fsum(centred[k] ** 2 for k in counted) / len(counted)) if counted else 1.0
    return [centred[k] / (std + 1e-6) if k in counted else 0.0 for k in range(len(rewards))]


def gae(
    rewards: Sequence[float], values: Sequence[float], gamma: float, lambda_: float, bootstrap: float
) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, each sum written out."""
    after = [*values[1:], bootstrap]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)] if rewards else []
    return [
        math.fsum((gamma * lambda_) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]


def gae_by_step(
    rewards: Sequence[float],
    values: Sequence[float],
    gammas: Sequence[float],
    lambdas: Sequence[float],
    bootstrap: float,
) -> list[float]:
    """A_t = Σ_k (γ_t λ_t … γ_{k−1} λ_{k−1}) δ_k, each sum and each product written out."""
    after = [*values[1:], bootstrap]
    deltas = [rewards[t] + gammas[t] * after[t] - values[t] for t in range(len(rewards))]
    return [
        math.fsum(math.prod(gammas[j] * lambdas[j] for j in range(t, k)) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]
