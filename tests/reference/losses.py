"""Slow twins of the losses: one row at a time, one token after the other, written out from the papers by cases.

They share nothing with the trainer and are written differently on purpose: no clamp or minimum over tensors, but an if
for each case and a constant where there is no gradient. Python's floats and float64 scalars.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

INFINITY = math.inf


@dataclass
class Token:
    logprob: Tensor  # a scalar with gradient
    behaviour: float
    advantage: float
    entropy: Tensor | float = 0.0
    reference: float = 0.0
    proximal: float | None = None

    @property
    def old(self) -> float:
        return self.behaviour if self.proximal is None else self.proximal

    @property
    def now(self) -> float:
        return float(self.logprob.detach())


RowLoss = Callable[[Sequence[Token]], list[Tensor]]  # the tokens of one row → a loss for each


def sft(row: Sequence[Token]) -> list[Tensor]:
    return [-token.logprob for token in row]


def ppo_clip(clip_low: float, clip_high: float, dual_clip: float = INFINITY, level: str = "token") -> RowLoss:
    """What a token is worth is its ratio times A; it stops counting past 1 + high where A > 0 and below 1 − low else."""

    def loss(row: Sequence[Token]) -> list[Tensor]:
        mean = torch.stack([token.logprob - token.old for token in row]).mean()
        losses: list[Tensor] = []
        for token in row:
            # The ratio, with the gradient that the level gives it.
            if level == "token":
                ratio = exp(token.logprob - token.old)
            elif level == "sequence":
                ratio = exp(mean)
            else:
                ratio = exp(mean.detach()) * torch.exp(token.logprob) / math.exp(token.now)
            value = float(ratio.detach())
            if token.advantage >= 0:
                worth = constant(1 + clip_high) if value > 1 + clip_high else ratio
            elif value < 1 - clip_low:
                worth = constant(1 - clip_low)
            else:
                worth = constant(dual_clip) if value > dual_clip else ratio
            losses.append(-worth * token.advantage)
        return losses

    return loss


def weighted(low: float, high: float, level: str = "token") -> RowLoss:
    """CISPO's loss, and REINFORCE's: the weight is a number."""

    def loss(row: Sequence[Token]) -> list[Tensor]:
        mean = sum(token.now - token.old for token in row) / len(row)
        ratios = [ratio_of(token.now - token.old if level == "token" else mean) for token in row]
        return [
            -max(low, min(high, ratio)) * token.advantage * token.logprob
            for token, ratio in zip(row, ratios, strict=True)
        ]

    return loss


def plain(row: Sequence[Token]) -> list[Tensor]:
    """REINFORCE without any weight."""
    return [-token.advantage * token.logprob for token in row]


def dppo(divergence: str, low: float, high: float, ratio_max: float) -> RowLoss:
    def loss(row: Sequence[Token]) -> list[Tensor]:
        losses: list[Tensor] = []
        for token in row:
            p, b = math.exp(token.now), math.exp(token.behaviour)
            distance = abs(p - b) if divergence == "tv" else b * math.log(b / p) + (1 - b) * math.log((1 - b) / (1 - p))
            too_good = token.advantage > 0 and p > b and distance > high
            too_bad = token.advantage < 0 and p < b and distance > low
            weight = 0.0 if too_good or too_bad else min(ratio_of(token.now - token.behaviour), ratio_max)
            losses.append(-weight * token.advantage * token.logprob)
        return losses

    return loss


RowWeights = Callable[[Sequence[Token], Sequence[float]], list[float]]  # a row and its ratios → a weight for each token


def composed(
    policy: RowLoss,
    weights: RowWeights | None = None,
    kl: Callable[[Token], Tensor] | None = None,
    shaping: Callable[[Token], float] | None = None,
    entropy_bonus: float = 0.0,
) -> RowLoss:
    def loss(row: Sequence[Token]) -> list[Tensor]:
        seen = [replace(token, advantage=token.advantage - (shaping(token) if shaping else 0.0)) for token in row]
        losses = policy(seen)
        if weights:
            logs = [(token.now if token.proximal is None else token.proximal) - token.behaviour for token in row]
            losses = [loss * weight for loss, weight in zip(losses, weights(seen, logs), strict=True)]
        return [
            loss + (kl(token) if kl else 0.0) - entropy_bonus * token.entropy
            for loss, token in zip(losses, row, strict=True)
        ]

    return loss


def tis(cap: float, level: str) -> RowWeights:
    def weights(row: Sequence[Token], logs: Sequence[float]) -> list[float]:
        return [min(cap, ratio_of(log if level == "token" else sum(logs))) for log in logs]

    return weights


def icepop(low: float, high: float, level: str, weigh: bool) -> RowWeights:
    def weights(row: Sequence[Token], logs: Sequence[float]) -> list[float]:
        ratios = [ratio_of(log if level == "token" else sum(logs)) for log in logs]
        return [(ratio if weigh else 1.0) if low <= ratio <= high else 0.0 for ratio in ratios]

    return weights


def geometric_mask(low: float, high: float) -> RowWeights:
    def weights(row: Sequence[Token], logs: Sequence[float]) -> list[float]:
        return [float(low <= ratio_of(sum(logs) / len(logs)) <= high)] * len(row)

    return weights


def off_policy_mask(delta: float) -> RowWeights:
    def weights(row: Sequence[Token], logs: Sequence[float]) -> list[float]:
        behind = sum(token.behaviour - token.now for token in row) / len(row)
        return [0.0 if behind > delta and token.advantage < 0 else 1.0 for token in row]

    return weights


def both(first: RowWeights, second: RowWeights) -> RowWeights:
    return lambda row, logs: [a * b for a, b in zip(first(row, logs), second(row, logs), strict=True)]


def kl(coefficient: float, kind: str, to: str = "reference", weight: str = "none") -> Callable[[Token], Tensor]:
    """weight  "none", or by current / behaviour: as a "number", or "with gradient"."""

    def term(token: Token) -> Tensor:
        other = token.reference if to == "reference" else token.behaviour
        d = token.logprob - other
        value = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]
        ratio = {
            "none": constant(1.0),
            "number": constant(math.exp(token.now - token.behaviour)),
            "with gradient": torch.exp(token.logprob - token.behaviour),
        }[weight]
        return coefficient * ratio * value

    return term


def exp(log_ratio: Tensor) -> Tensor:
    """e to that; constant beyond ±10."""
    value = float(log_ratio.detach())
    return torch.exp(log_ratio) if abs(value) <= 10 else constant(ratio_of(value))


def ratio_of(log_ratio: float) -> float:
    return math.exp(max(-10.0, min(10.0, log_ratio)))


def constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
