"""Policy terms: what makes good tokens likelier, each with the paper that it is from.

A term is a Loss by itself, and what `compose` builds on. A is the advantage, r = current / old, where old is the
behaviour unless the batch carries proximal log-probs; sg[·] passes no gradient. `level` says whose ratio: each token's,
or its row's, exp(mean log r) over the row's trained tokens.

    ppo_clip     −min(r A, clip(r, 1 − low, 1 + high) A)           grpo, dr_grpo, dapo, gspo are choices of it
    cispo        −sg[clip(r, 1 − low, 1 + high)] A log π
    reinforce    −sg[min(r, ratio_max)] A log π
    dppo         −sg[min(r, ratio_max)] A log π, none for tokens that left the trust region the way A pulls
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.optimize.losses.inputs import (
    Level,
    LossInputs,
    LossOutputs,
    Surrogate,
    check_known,
    check_range,
    clamped_exp,
)
from trainer.optimize.losses.metrics import policy_metrics, reference_metrics

# K scored tokens.

INFINITY = float("inf")
ClipLevel = Literal["token", "sequence", "sequence_token"]


@dataclass(frozen=True, slots=True)
class PolicyTerm:
    """A policy term, itself a Loss.

    surrogate     what it makes of a pack
    weighs        the samples are weighted by their ratio in it, so a correction by that same ratio would count it twice
    of_behaviour  that ratio is current / behaviour also where the batch has proximal log-probs
    """

    surrogate: Callable[[LossInputs], Surrogate]
    weighs: bool
    of_behaviour: bool = False

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        term = self.surrogate(inputs)
        return term.loss_K, policy_metrics(inputs, term) | reference_metrics(inputs)


def ppo_clip(
    *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None, level: ClipLevel = "token"
) -> PolicyTerm:
    """PPO's clipped surrogate (arXiv 1707.06347) with DAPO's wider upper side (arXiv 2503.14476).

    A token whose ratio is already past the clip in the direction that its advantage wants gets no gradient.

    dual_clip  for A < 0 the loss is at most dual_clip · |A| (dual clip, arXiv 1912.09729; 3 there), and a token whose
               ratio is beyond it gets no gradient: a bad token that became likely cannot blow up the step. Above 1
    level      "sequence": GSPO (arXiv 2507.18071). The gradient of a row's ratio reaches every token of the row
               "sequence_token": GSPO-token. The row's ratio in value, each token's own in gradient, so that advantages
               may differ within a row; where they do not, gradients are those of "sequence"
    """
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, INFINITY)
    check_known("level", level, ("token", "sequence", "sequence_token"))
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip={dual_clip} is not above 1 + clip_high={1 + clip_high}: it would undo the clip")

    def surrogate(inputs: LossInputs) -> Surrogate:
        advantages_K = inputs.advantages_K
        ratio_K = _ratio_with_gradient(inputs, level)
        gain_K = ratio_K * advantages_K
        clipped_gain_K = ratio_K.clamp(1 - clip_low, 1 + clip_high) * advantages_K
        low_K = (ratio_K < 1 - clip_low) & (advantages_K < 0)
        high_K = (ratio_K > 1 + clip_high) & (advantages_K > 0)
        gain_K = torch.minimum(gain_K, clipped_gain_K)
        if dual_clip is not None:
            high_K = high_K | ((ratio_K > dual_clip) & (advantages_K < 0))
            gain_K = torch.where(advantages_K < 0, torch.maximum(gain_K, dual_clip * advantages_K), gain_K)
        return Surrogate(-gain_K, ratio_K.detach(), low_K, high_K)

    return PolicyTerm(surrogate, weighs=True)


def grpo(*, clip: float = 0.2) -> PolicyTerm:
    """GRPO's clip, equal on both sides (arXiv 2402.03300). The paper averages each row, then rows: normalise="sequence"."""
    return ppo_clip(clip_low=clip, clip_high=clip)


def dr_grpo(*, clip: float = 0.2) -> PolicyTerm:
    """Dr. GRPO (arXiv 2503.20783): GRPO's clip; what is its own is normalise="fixed" and advantages without std."""
    return grpo(clip=clip)


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28) -> PolicyTerm:
    """DAPO's clip-higher (arXiv 2503.14476), which leaves unlikely tokens room to grow. With normalise="token"."""
    return ppo_clip(clip_low=clip_low, clip_high=clip_high)


def gspo(
    *, clip_low: float = 3e-4, clip_high: float = 4e-4, level: Literal["sequence", "sequence_token"] = "sequence"
) -> PolicyTerm:
    """GSPO (arXiv 2507.18071): one ratio a row, so a row is clipped as a whole. With normalise="sequence".

    The limits are the paper's: a mean over tokens moves by thousandths where single tokens move by tenths. They suit
    data of the newest weights; with stale data, or an engine that differs from the trainer by more, widen them.
    """
    check_known("level", level, ("sequence", "sequence_token"))
    return ppo_clip(clip_low=clip_low, clip_high=clip_high, level=level)


def cispo(*, clip_low: float = 1.0, clip_high: float = 3.0, level: Level = "token") -> PolicyTerm:
    """REINFORCE weighted by a clipped ratio that carries no gradient (CISPO, MiniMax-M1, arXiv 2506.13585).

    Unlike PPO's clip no token loses its gradient, which is what rare but decisive tokens need once data is a
    few versions old. clip_low=1 leaves the lower side open, as the paper does; the upper side holds the
    weight to 4.
    """
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, INFINITY)
    check_known("level", level, ("token", "sequence"))

    def surrogate(inputs: LossInputs) -> Surrogate:
        return _weighted(inputs, _ratio(inputs, level), 1 - clip_low, 1 + clip_high)

    return PolicyTerm(surrogate, weighs=True)


def reinforce(*, ratio_max: float | None = 2.0, level: Level = "token") -> PolicyTerm:
    """REINFORCE with truncated importance sampling: weight min(ratio, ratio_max), without gradient.

    The truncation is IMPALA's ρ̄ (arXiv 1802.01561), per token; the usual cap of 2 is from its use against the
    mismatch between serving and training numerics. ratio_max=None: no weight at all, for data of the current policy
    or together with a correction.
    """
    if ratio_max is not None:
        check_range("ratio_max", ratio_max, 0.0, INFINITY)
    check_known("level", level, ("token", "sequence"))

    def surrogate(inputs: LossInputs) -> Surrogate:
        ratio_K = _ratio(inputs, level)
        if ratio_max is None:
            never_K = torch.zeros_like(ratio_K, dtype=torch.bool)
            return Surrogate(-inputs.advantages_K * inputs.logprobs_K, ratio_K, never_K, never_K)
        return _weighted(inputs, ratio_K, 0.0, ratio_max)

    return PolicyTerm(surrogate, weighs=ratio_max is not None)


def dppo(
    *,
    divergence: Literal["tv", "kl"] = "tv",
    mask_low: float | None = None,
    mask_high: float | None = None,
    ratio_max: float = 20.0,
) -> PolicyTerm:
    """DPPO (arXiv 2602.04879): a trust region on how far the token's *probability* moved, where PPO looks at its ratio.

    A token from 0.001 to 0.002 has doubled and hardly matters; one from 0.99 to 0.6 is far within PPO's clip and changes
    what the policy does. With p current and b behaviour probability, a token is masked, losing its gradient,

    divergence  "tv": p − b > mask_high where A > 0, b − p > mask_low where A < 0. Both 0.2 unless given
                "kl": b log(b/p) + (1−b) log((1−b)/(1−p)) above mask_high where A > 0 and p > b, above mask_low where
                A < 0 and p < b. Both 0.05 unless given
    ratio_max   the importance weight is held to this, so that a token the behaviour hardly ever samples cannot rule the
                step

    The region is around the policy that sampled even where the batch has proximal log-probs, as in the paper.
    """
    check_known("divergence", divergence, ("tv", "kl"))
    default = 0.2 if divergence == "tv" else 0.05
    low = default if mask_low is None else mask_low
    high = default if mask_high is None else mask_high
    check_range("mask_low", low, 0.0, INFINITY)
    check_range("mask_high", high, 0.0, INFINITY)
    check_range("ratio_max", ratio_max, 0.0, INFINITY)

    def surrogate(inputs: LossInputs) -> Surrogate:
        ratio_K = clamped_exp((inputs.logprobs_K - inputs.behaviour_logprobs_K).detach())
        rise_K = inputs.logprobs_K.detach().exp() - inputs.behaviour_logprobs_K.exp()
        distance_K = rise_K.abs() if divergence == "tv" else _binary_kl(inputs)
        high_K = (rise_K > 0) & (distance_K > high) & (inputs.advantages_K > 0)
        low_K = (rise_K < 0) & (distance_K > low) & (inputs.advantages_K < 0)
        weight_K = torch.where(low_K | high_K, 0.0, ratio_K.clamp(max=ratio_max))
        return Surrogate(-weight_K * inputs.advantages_K * inputs.logprobs_K, ratio_K, low_K, high_K)

    return PolicyTerm(surrogate, weighs=True, of_behaviour=True)


def _weighted(inputs: LossInputs, ratio_K: Tensor, low: float, high: float) -> Surrogate:
    weight_K = ratio_K.clamp(low, high)
    return Surrogate(-weight_K * inputs.advantages_K * inputs.logprobs_K, ratio_K, ratio_K < low, ratio_K > high)


def _ratio(inputs: LossInputs, level: Level) -> Tensor:
    """Current / old without gradient, of each token or of its row."""
    log_ratio_K = (inputs.logprobs_K - inputs.old_logprobs_K).detach()
    return clamped_exp(log_ratio_K if level == "token" else inputs.row_means(log_ratio_K))


def _ratio_with_gradient(inputs: LossInputs, level: ClipLevel) -> Tensor:
    log_ratio_K = inputs.logprobs_K - inputs.old_logprobs_K
    if level == "token":
        return clamped_exp(log_ratio_K)
    mean_K = inputs.row_means(log_ratio_K)
    if level == "sequence_token":
        mean_K = mean_K.detach() + inputs.logprobs_K - inputs.logprobs_K.detach()
    return clamped_exp(mean_K)


@torch.no_grad()
def _binary_kl(inputs: LossInputs) -> Tensor:
    """KL(behaviour ‖ current) of the choice between the sampled token and any other."""
    behaviour_K, current_K = inputs.behaviour_logprobs_K, inputs.logprobs_K
    # log(1 − p); where a token is certain, its complement is as likely as rounding allows rather than impossible.
    tiny = torch.finfo(current_K.dtype).eps
    other_behaviour_K = (-behaviour_K.expm1()).clamp(min=tiny)
    other_current_K = (-current_K.expm1()).clamp(min=tiny)
    return (
        behaviour_K.exp() * (behaviour_K - current_K) + other_behaviour_K * (other_behaviour_K / other_current_K).log()
    )
