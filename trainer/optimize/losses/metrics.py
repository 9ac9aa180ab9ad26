"""What a step says about its losses: sums and maxima over tokens, added over packs and ranks, divided once at the end.

A metric is a scalar tensor without gradient, and its name says how packs are put together:

    ratio_max             ends in _max: the maximum
    tokens_staleness_2    tokens two versions old, a sum
    kl_k2_staleness_2     a sum over those tokens, divided by their number at the end
    any other             a sum over all tokens, divided by the number of trained tokens

Every pack has the same names, so ranks can be reduced name by name: MAX where `is_maximum`, else SUM.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.optimize.losses.inputs import LossInputs, Surrogate

# K scored tokens, S bins of staleness.

STALENESS_BINS = ("unknown", "0", "1", "2", "3", "4_up")  # 0 apart: what differs there is numerics, not policy lag


def is_maximum(name: str) -> bool:
    return name.endswith("_max")


def add_metrics(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Put the metrics of one more pack into `totals`, in place. No gradient is kept."""
    for name, value in more.items():
        if name not in totals:
            totals[name] = value.detach()
        elif is_maximum(name):
            totals[name] = torch.maximum(totals[name], value.detach())
        else:
            totals[name] = totals[name] + value.detach()


def mean_metrics(totals: Mapping[str, float], trained_tokens: float) -> dict[str, float]:
    """Return what the log wants of a step's totals; bins of staleness without tokens are left out.

    tokens_staleness_S becomes share_staleness_S, the part of the tokens that was so old.
    """
    found: dict[str, float] = {}
    for name, value in totals.items():
        kind, _, bin_name = name.partition("_staleness_")
        if is_maximum(name):
            found[name] = value
        elif not bin_name:
            found[name] = value / trained_tokens
        elif (tokens := totals[f"tokens_staleness_{bin_name}"]) > 0:
            found["share" + name.removeprefix(kind) if kind == "tokens" else name] = value / (
                trained_tokens if kind == "tokens" else tokens
            )
    return found


@torch.no_grad()
def policy_metrics(inputs: LossInputs, term: Surrogate) -> dict[str, Tensor]:
    """How far the current policy is from the one that sampled.

    With d = log current − log behaviour on the behaviour's samples, three estimates of KL(behaviour ‖ current)
    (Schulman, "Approximating KL divergence", 2020): k1 = −d without bias, k2 = d²/2 with little variance, and
    k3 = e^d − d − 1 with neither a bias nor much variance, and never negative.
    """
    logprobs_K = inputs.logprobs_K.detach()
    log_ratio_K = logprobs_K - inputs.behaviour_logprobs_K
    k2_K = log_ratio_K.square() / 2
    low_share, high_share = term.low_K.sum().to(logprobs_K.dtype), term.high_K.sum().to(logprobs_K.dtype)
    found = {
        "ratio": term.ratio_K.sum(),
        "ratio_max": term.ratio_K.max(),
        "clip_low_share": low_share,
        "clip_high_share": high_share,
        "clip_share": low_share + high_share,
        "kl_k1": -log_ratio_K.sum(),
        "kl_k2": k2_K.sum(),
        "kl_k3": _k3(log_ratio_K).sum(),
        "logprob_difference": log_ratio_K.abs().sum(),
        "logprob_difference_max": log_ratio_K.abs().max(),
        "entropy": inputs.entropies_K.detach().sum(),
    }
    if inputs.staleness_K is not None:
        bin_K = inputs.staleness_K.clamp(-1, len(STALENESS_BINS) - 2) + 1
        for name, values_K in (
            ("tokens", torch.ones_like(k2_K)),
            ("logprob_difference", log_ratio_K.abs()),
            ("kl_k2", k2_K),
        ):
            sums_S = k2_K.new_zeros(len(STALENESS_BINS)).index_add(0, bin_K, values_K)
            found |= {f"{name}_staleness_{at}": sums_S[s] for s, at in enumerate(STALENESS_BINS)}
    return found


@torch.no_grad()
def reference_metrics(inputs: LossInputs) -> dict[str, Tensor]:
    """KL(current ‖ reference), estimated on the behaviour's samples as if they were the current policy's."""
    if inputs.reference_logprobs_K is None:
        return {}
    log_ratio_K = inputs.logprobs_K.detach() - inputs.reference_logprobs_K
    return {
        "reference_kl_k1": log_ratio_K.sum(),
        "reference_kl_k2": (log_ratio_K.square() / 2).sum(),
        "reference_kl_k3": _k3(-log_ratio_K).sum(),
    }


def _k3(log_ratio_K: Tensor) -> Tensor:
    clamped_K = log_ratio_K.clamp(-10.0, 10.0)
    return clamped_K.expm1() - clamped_K
