"""Slow twin of trainer.data.advantages: one rollout at a time, in plain Python."""

import math


def group_advantages(rewards: list[float], groups: list[object], *, scale: str = "none") -> list[float]:
    answers = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [other for other, theirs in zip(rewards, groups, strict=True) if theirs == group]
        mean = math.fsum(peers) / len(peers)
        advantage = reward - mean
        if scale == "std" and len(peers) > 1:
            std = math.sqrt(math.fsum((peer - mean) ** 2 for peer in peers) / (len(peers) - 1))
            advantage /= std + 1e-6
        answers.append(advantage if len(peers) > 1 else 0.0)
    return answers


def rloo_advantages(rewards: list[float], groups: list[object]) -> list[float]:
    answers = []
    for index, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [rewards[k] for k in range(len(rewards)) if k != index and groups[k] == group]
        answers.append(reward - math.fsum(others) / len(others) if others else 0.0)
    return answers
