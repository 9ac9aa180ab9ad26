"""Losses: each a small function from what is known of K tokens to a loss per token and sums for the log.

A loss neither averages nor weighs. The step multiplies by the tokens' weights, sums over every pack, and
divides once by one denominator, so that how the rows were packed cannot change the gradient. Metrics are sums
over tokens for the same reason; the step divides them by the number of tokens at the end.

Here log-prob means under the sampling temperature, `behaviour` is the policy that sampled (as the engine
recorded it), and the ratio is current / behaviour.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# K scored tokens.

LOG_RATIO_MAX = 10.0  # e^10 is already absurd as a ratio; beyond it exp() only makes infinities


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss may look at, per scored token, all (K,) float32. Only logprobs_K carries a gradient."""

    logprobs_K: Tensor
    behaviour_logprobs_K: Tensor
    advantages_K: Tensor
    entropies_K: Tensor


LossOutputs = tuple[Tensor, dict[str, Tensor]]  # (K,) loss of each token; sums over the tokens, by metric name
Loss = Callable[[LossInputs], LossOutputs]


def sft(inputs: LossInputs) -> LossOutputs:
    """Cross-entropy: make the recorded tokens likely. Behaviour log-probs and advantages are not read."""
    return -inputs.logprobs_K, {"entropy": inputs.entropies_K.sum()}


def ppo_clip(*, clip_low: float = 0.2, clip_high: float = 0.28) -> Loss:
    """PPO's clipped surrogate (arXiv 1707.06347) with DAPO's wider upper side (arXiv 2503.14476).

    A token whose ratio is already past the clip in the direction that its advantage wants gets no gradient.
    """
    _check_range("clip_low", clip_low, 0.0, 1.0)
    _check_range("clip_high", clip_high, 0.0, float("inf"))

    def loss(inputs: LossInputs) -> LossOutputs:
        ratio_K = _ratio(inputs)
        clipped_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
        gain_K = ratio_K * inputs.advantages_K
        clipped_gain_K = clipped_K * inputs.advantages_K
        metrics = _metrics(inputs, ratio_K, clipped_gain_K < gain_K)
        return -torch.minimum(gain_K, clipped_gain_K), metrics

    return loss


def cispo(*, clip_low: float = 1.0, clip_high: float = 3.0) -> Loss:
    """REINFORCE weighted by a clipped ratio that carries no gradient (CISPO, MiniMax-M1, arXiv 2506.13585).

    Unlike PPO's clip no token loses its gradient, which is what rare but decisive tokens need once data is a
    few versions old. clip_low=1 leaves the lower side open, as the paper does; the upper side holds the
    weight to 4.
    """
    _check_range("clip_low", clip_low, 0.0, 1.0)
    _check_range("clip_high", clip_high, 0.0, float("inf"))

    def loss(inputs: LossInputs) -> LossOutputs:
        ratio_K = _ratio(inputs).detach()
        weight_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
        return -weight_K * inputs.advantages_K * inputs.logprobs_K, _metrics(inputs, ratio_K, weight_K != ratio_K)

    return loss


def reinforce(*, ratio_max: float = 2.0) -> Loss:
    """REINFORCE with truncated importance sampling: weight min(ratio, ratio_max), without gradient.

    The truncation is IMPALA's ρ̄ (arXiv 1802.01561), per token; the usual cap of 2 is from its use against the
    mismatch between serving and training numerics.
    """
    _check_range("ratio_max", ratio_max, 0.0, float("inf"))

    def loss(inputs: LossInputs) -> LossOutputs:
        ratio_K = _ratio(inputs).detach()
        weight_K = ratio_K.clamp(max=ratio_max)
        return -weight_K * inputs.advantages_K * inputs.logprobs_K, _metrics(inputs, ratio_K, weight_K != ratio_K)

    return loss


def _ratio(inputs: LossInputs) -> Tensor:
    return (inputs.logprobs_K - inputs.behaviour_logprobs_K).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def _metrics(inputs: LossInputs, ratio_K: Tensor, clipped_K: Tensor) -> dict[str, Tensor]:
    """Sums over tokens. k1 and k2 estimate KL(behaviour ‖ current) on the behaviour's own samples: k1 without
    bias, k2 with little variance (Schulman, "Approximating KL divergence", 2020)."""
    with torch.no_grad():
        behind_K = inputs.behaviour_logprobs_K - inputs.logprobs_K
        return {
            "ratio": ratio_K.detach().sum(),
            "clip_share": clipped_K.sum().to(ratio_K.dtype),
            "kl_k1": behind_K.sum(),
            "kl_k2": (behind_K.square() / 2).sum(),
            "logprob_difference": behind_K.abs().sum(),
            "entropy": inputs.entropies_K.sum(),
        }


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low}, {high}]")
