"""Losses: each a small function from what is known of K tokens to a loss per token and metrics for the log.

A loss neither averages nor weighs. The step multiplies by the tokens' weights, sums over every pack, and
divides once by one denominator, so that how the rows were packed cannot change the gradient; what that is a mean over
is `pack_rows(normalise=...)`. Metrics are sums over tokens for the same reason (`metrics.py`).

    loss = dapo()                                                  # a policy term is a loss
    loss = compose(
        grpo(clip=0.2),                                            # policy.py
        corrections=[geometric_mask(low=0.99, high=1.01)],         # correction.py
        kl=Kl(coefficient=1e-3, kind="k2"),                        # divergence.py
        entropy_bonus=1e-3,
    )

compose is      loss = keep · weight · policy + β · KL − c · entropy
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.data.batch import Normalise
from trainer.optimize.losses.correction import Correction, geometric_mask, icepop, off_policy_mask, tis
from trainer.optimize.losses.divergence import Kl, KlShaping
from trainer.optimize.losses.inputs import Loss, LossInputs, LossOutputs, Surrogate, check_range, inputs_of
from trainer.optimize.losses.metrics import (
    add_metrics,
    is_maximum,
    mean_metrics,
    policy_metrics,
    reference_metrics,
)
from trainer.optimize.losses.policy import PolicyTerm, cispo, dapo, dppo, dr_grpo, grpo, gspo, ppo_clip, reinforce

# K scored tokens.

__all__ = [
    "NAMED", "Correction", "Kl", "KlShaping", "Loss", "LossInputs", "LossOutputs", "NamedLoss", "PolicyTerm",
    "Surrogate", "add_metrics", "cispo", "compose", "dapo", "dppo", "dr_grpo", "geometric_mask", "grpo", "gspo",
    "icepop", "inputs_of", "is_maximum", "mean_metrics", "off_policy_mask", "ppo_clip", "reinforce", "sft", "tis",
]  # fmt: skip


def sft(inputs: LossInputs) -> LossOutputs:
    """Cross-entropy: make the recorded tokens likely. Behaviour log-probs and advantages are not read."""
    return -inputs.logprobs_K, {"entropy": inputs.entropies_K.detach().sum()}


def compose(
    policy: PolicyTerm,
    *,
    corrections: Sequence[Correction] = (),
    kl: Kl | KlShaping | None = None,
    entropy_bonus: float = 0.0,
) -> Loss:
    """Return the loss: the policy term, corrected, plus KL, minus entropy_bonus · entropy.

    corrections    a token is kept if all keep it; at most one of them may weigh. They act on the policy term alone
    entropy_bonus  nats of entropy are worth this much loss; 1e-3 is much

    Raises ValueError for corrections that count the same ratio twice, here or when it first sees a batch.
    """
    check_range("entropy_bonus", entropy_bonus, 0.0, float("inf"))
    weighing = sum(correction.weighs for correction in corrections)
    if weighing > 1:
        raise ValueError(f"{weighing} corrections weigh by the same ratio, which counts it {weighing} times: keep one")
    truncates = any(correction.truncates for correction in corrections)
    if truncates and policy.weighs and policy.of_behaviour:
        raise ValueError(
            "the policy term weighs by current / behaviour whatever proximal log-probs there are, and tis would count its "
            "share of that twice: use a correction that drops (icepop, geometric_mask), or another policy term"
        )

    def loss(inputs: LossInputs) -> LossOutputs:
        seen = kl.shaped(inputs) if isinstance(kl, KlShaping) else inputs
        term = policy.surrogate(seen)
        metrics = policy_metrics(inputs, term) | reference_metrics(inputs)
        loss_K = term.loss_K
        if corrections:
            bypass = seen.proximal_logprobs_K is None
            counted = policy.weighs and (bypass or policy.of_behaviour)
            if truncates and counted:
                raise ValueError(
                    "the policy term weighs by current / behaviour already and tis would count it twice: give the batch "
                    "proximal log-probs, use reinforce(ratio_max=None), or a correction that drops (icepop, geometric_mask)"
                )
            keep_K, weight_K = _corrected(seen, corrections, weigh=not counted)
            loss_K = torch.where(keep_K, weight_K * loss_K, 0.0)
            metrics["masked_share"] = (~keep_K).sum().to(weight_K.dtype)
            metrics["correction"] = torch.where(keep_K, weight_K, 0.0).sum()
        if isinstance(kl, Kl):
            loss_K = loss_K + kl.loss(inputs)
        if entropy_bonus:
            loss_K = loss_K - entropy_bonus * inputs.entropies_K
        return loss_K, metrics

    return loss


@torch.no_grad()
def _corrected(inputs: LossInputs, corrections: Sequence[Correction], *, weigh: bool) -> tuple[Tensor, Tensor]:
    """(K,) what to keep and (K,) what it weighs.

    weigh  False: the policy term holds the ratio that is corrected here, so tokens are only dropped
    """
    corrected_K = inputs.logprobs_K if inputs.proximal_logprobs_K is None else inputs.proximal_logprobs_K
    log_ratio_K = corrected_K.detach() - inputs.behaviour_logprobs_K
    keep_K = torch.ones_like(log_ratio_K, dtype=torch.bool)
    weight_K = torch.ones_like(log_ratio_K)
    for correction in corrections:
        kept_K, its_weight_K = correction.correct(log_ratio_K, inputs)
        keep_K = keep_K & kept_K
        if its_weight_K is not None and weigh:
            weight_K = its_weight_K
    return keep_K, weight_K


@dataclass(frozen=True, slots=True)
class NamedLoss:
    """make returns the policy term, with the options that it has; normalise is what its paper's mean is over."""

    make: Callable[..., PolicyTerm]
    normalise: Normalise


NAMED: Mapping[str, NamedLoss] = MappingProxyType(
    {
        "ppo_clip": NamedLoss(ppo_clip, "token"),
        "grpo": NamedLoss(grpo, "sequence"),
        "bnpo": NamedLoss(grpo, "token"),
        "dr_grpo": NamedLoss(dr_grpo, "fixed"),
        "dapo": NamedLoss(dapo, "token"),
        "gspo": NamedLoss(gspo, "sequence"),
        "cispo": NamedLoss(cispo, "token"),
        "reinforce": NamedLoss(reinforce, "token"),
        "dppo": NamedLoss(dppo, "token"),
    }
)
