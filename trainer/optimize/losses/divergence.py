"""KL terms: hold the policy near another one, as a loss beside the policy's or inside the advantage.

With d = log current − log other on tokens that the behaviour sampled, three estimates of KL(current ‖ other) (Schulman,
"Approximating KL divergence", 2020):

    k1 = d        k2 = d² / 2        k3 = e^−d − 1 + d

A good estimate of the value need not be a good loss. On the policy's own samples, the expected gradient

    of k1  is zero: a loss of it does nothing but add noise. It belongs into the advantage (`kl_shaping`)
    of k2  is that of KL(current ‖ other), which is wanted
    of k3  is that of KL(other ‖ current): it also holds the policy near, but covers where the other has mass

(arXiv 2506.09477, 2510.01555). On other samples each token is to be weighted by r = current / behaviour
(`importance_weighted`, DeepSeek-V3.2, arXiv 2512.02556): for k1 and k3 the gradient flows through r as well, which makes
their gradient that of KL(current ‖ other) without bias; for k2 r is only a weight, which makes its so.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from trainer.optimize.losses.inputs import LOG_RATIO_MAX, LossInputs, check_known, check_range, clamped_exp

# K scored tokens.

KlKind = Literal["k1", "k2", "k3"]
Other = Literal["reference", "behaviour"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kl:
    """coefficient · KL to the other policy, added to each token's loss.

    kind                "k2" has the right gradient on the policy's own samples; "k3" is GRPO's (arXiv 2402.03300)
    to                  "reference", or "behaviour": near the policy that sampled (Kimi K2.5, arXiv 2602.02276)
    importance_weighted weight by current / behaviour: the right gradient on samples of older policies too
    """

    coefficient: float
    kind: KlKind = "k2"
    to: Other = "reference"
    importance_weighted: bool = False

    def __post_init__(self) -> None:
        _check(self.coefficient, self.to)
        check_known("kind", self.kind, ("k1", "k2", "k3"))
        if self.kind == "k1" and not self.importance_weighted:
            raise ValueError(
                "k1 as a loss has a gradient of zero on average: use k2, importance_weighted, or KlShaping"
            )

    def loss(self, inputs: LossInputs) -> Tensor:
        """(K,) with gradient."""
        apart_K = (inputs.logprobs_K - _other(inputs, self.to)).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
        if self.kind == "k1":
            kl_K = apart_K
        elif self.kind == "k2":
            kl_K = apart_K.square() / 2
        else:
            kl_K = (-apart_K).expm1() + apart_K
        if self.importance_weighted:
            ratio_K = clamped_exp(inputs.logprobs_K - inputs.behaviour_logprobs_K)
            kl_K = kl_K * (ratio_K.detach() if self.kind == "k2" else ratio_K)
        return self.coefficient * kl_K


@dataclass(frozen=True, slots=True, kw_only=True)
class KlShaping:
    """A − coefficient · k1 of the same token, without gradient: KL as a cost that the policy term learns to avoid.

    The cost of a token falls on that token alone; what it leads to later is left to the reward.
    """

    coefficient: float
    to: Other = "reference"

    def __post_init__(self) -> None:
        _check(self.coefficient, self.to)

    def shaped(self, inputs: LossInputs) -> LossInputs:
        apart_K = (inputs.logprobs_K.detach() - _other(inputs, self.to)).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
        return replace(inputs, advantages_K=inputs.advantages_K - self.coefficient * apart_K)


def _other(inputs: LossInputs, to: Other) -> Tensor:
    if to == "behaviour":
        return inputs.behaviour_logprobs_K
    if inputs.reference_logprobs_K is None:
        raise ValueError(
            "a KL term to the reference needs reference_logprobs_K and the batch has none: have the reference score "
            "it (PackedBatch.with_logprobs), or leave the KL term out"
        )
    return inputs.reference_logprobs_K


def _check(coefficient: float, to: str) -> None:
    check_range("coefficient", coefficient, 0.0, float("inf"))
    check_known("to", to, ("reference", "behaviour"))
