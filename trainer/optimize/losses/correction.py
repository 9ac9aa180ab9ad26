"""Corrections: samples are not quite the trainer's own, so weigh or drop them. Never a gradient through them.

What is corrected is r = proximal / behaviour: what lies between the engine's numbers and the trainer's for weights that
should be the same, and between old weights and new. Without proximal log-probs ("bypass") r = current / behaviour, and
most policy terms then hold it already; a correction drops what it would drop, and does not weigh again.

    tis              weight min(r, cap)                           truncated importance sampling
    icepop           weight r within [low, high], else dropped
    geometric_mask   rows with exp(mean log r) outside [low, high] are dropped
    off_policy_mask  what is bad is dropped of rows that the policy has moved away from

A dropped token keeps its place in the denominator: the step is not made larger by what it may not learn from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.optimize.losses.inputs import Level, LossInputs, check_known, check_range, clamped_exp

# K scored tokens.

INFINITY = float("inf")


class Corrected(NamedTuple):
    """What a correction wants: (K,) bool tokens to keep, and (K,) weights or None where it only drops."""

    keep_K: Tensor
    weight_K: Tensor | None


@dataclass(frozen=True, slots=True)
class Correction:
    """correct   from log r of each token, and the pack, to what is kept and how much it weighs
    weighs    it is more than a mask, so two such would count r twice
    truncates it is nothing but a weight: beside a policy term that holds r already it would do nothing
    """

    correct: Callable[[Tensor, LossInputs], Corrected]
    weighs: bool = False
    truncates: bool = False


def tis(*, cap: float = 2.0, level: Level = "token") -> Correction:
    """Truncated importance sampling: weight min(r, cap) (IMPALA, arXiv 1802.01561; the cap of 2 is usual).

    level  "sequence": r is the product over the row's trained tokens, one weight for all of them. Without bias but for
           the cap, and of a variance that grows with the length
    """
    check_range("cap", cap, 0.0, INFINITY)
    check_known("level", level, ("token", "sequence"))

    def correct(log_ratio_K: Tensor, inputs: LossInputs) -> Corrected:
        ratio_K = _ratio(log_ratio_K, inputs, level)
        return Corrected(torch.ones_like(ratio_K, dtype=torch.bool), ratio_K.clamp(max=cap))

    return Correction(correct, weighs=True, truncates=True)


def icepop(*, low: float = 0.5, high: float = 5.0, level: Level = "token") -> Correction:
    """IcePop (Ring-1T, arXiv 2510.18855): weight r where it lies within [low, high], and no gradient elsewhere.

    A token on which engine and trainer disagree so much says more about numerics than about the policy.
    level  "sequence": r is the product over the row's trained tokens; a row is dropped as a whole
    """
    _check_band(low, high)
    check_known("level", level, ("token", "sequence"))

    def correct(log_ratio_K: Tensor, inputs: LossInputs) -> Corrected:
        ratio_K = _ratio(log_ratio_K, inputs, level)
        return Corrected(_within(ratio_K, low, high), ratio_K)

    return Correction(correct, weighs=True)


def geometric_mask(*, low: float = 0.9, high: float = 1.1) -> Correction:
    """Drop rows whose geometric mean ratio, exp(mean log r), lies outside [low, high].

    Unlike a product it does not grow with the length. The defaults drop what is clearly broken, a tenth of a nat a token;
    at staleness 0 and in bfloat16 [0.99, 1.01] is usual.
    """
    _check_band(low, high)

    def correct(log_ratio_K: Tensor, inputs: LossInputs) -> Corrected:
        ratio_K = clamped_exp(inputs.row_means(log_ratio_K))
        return Corrected(_within(ratio_K, low, high), None)

    return Correction(correct)


def off_policy_mask(*, delta: float) -> Correction:
    """Drop tokens with A < 0 of rows with mean(log behaviour − log current) above delta (DeepSeek-V3.2, arXiv 2512.02556).

    What the policy has long moved away from need not be pushed further; what was good may still be learnt from. It
    compares with the current policy also where there are proximal log-probs.
    """
    check_range("delta", delta, 0.0, INFINITY)

    def correct(log_ratio_K: Tensor, inputs: LossInputs) -> Corrected:
        behind_K = inputs.row_means(inputs.behaviour_logprobs_K - inputs.logprobs_K.detach())
        return Corrected(~((behind_K > delta) & (inputs.advantages_K < 0)), None)

    return Correction(correct)


def _ratio(log_ratio_K: Tensor, inputs: LossInputs, level: Level) -> Tensor:
    return clamped_exp(log_ratio_K if level == "token" else inputs.row_sums(log_ratio_K))


def _within(ratio_K: Tensor, low: float, high: float) -> Tensor:
    # Not (>= low) & (<= high): a NaN would then be dropped in silence, where it is to fail the step.
    return ~((ratio_K < low) | (ratio_K > high))


def _check_band(low: float, high: float) -> None:
    check_range("low", low, 0.0, INFINITY)
    check_range("high", high, low, INFINITY)
