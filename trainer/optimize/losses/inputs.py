"""What a loss looks at, and the few sums over tokens and rows that all losses share.

Everything is per scored token of one pack. A row is never split over packs, so what is summed over a row here is
complete, and nothing about how the rows were packed can be seen in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.data.batch import PackedBatch

# K scored tokens, R rows of the pack.

LOG_RATIO_MAX = 10.0  # e^10 is already absurd as a ratio; beyond it exp() only makes infinities

Level = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """One pack as a loss sees it. Log-probs are under the sampling temperature, in nats.

    logprobs_K            (K,) float32  under the current weights; carries the gradient
    behaviour_logprobs_K  (K,) float32  under the policy that sampled, as the engine recorded them
    advantages_K          (K,) float32
    entropies_K           (K,) float32  of the current policy where the token was sampled; carries a gradient too, so
                                        a metric detaches it
    row_K                 (K,) int64    which row of the pack a token belongs to, ascending from 0
    num_rows              rows of the pack, each of which has scored tokens
    staleness_K           (K,) int64    versions between the weights that sampled its call and those being improved; -1: not
                                        known
    reference_logprobs_K  (K,) float32  under the reference policy, without gradient; None: there is none
    proximal_logprobs_K   (K,) float32  under the trainer's own weights before this batch's first update, without
                                        gradient; None: the behaviour takes their place ("bypass")
    """

    logprobs_K: Tensor
    behaviour_logprobs_K: Tensor
    advantages_K: Tensor
    entropies_K: Tensor
    row_K: Tensor
    num_rows: int
    staleness_K: Tensor | None = None
    reference_logprobs_K: Tensor | None = None
    proximal_logprobs_K: Tensor | None = None

    @property
    def old_logprobs_K(self) -> Tensor:
        """What the policy's ratio is taken against: the proximal policy where there is one, else the behaviour."""
        return self.behaviour_logprobs_K if self.proximal_logprobs_K is None else self.proximal_logprobs_K

    def row_sums(self, values_K: Tensor) -> Tensor:
        """(K,) for each token the sum of the values over its row."""
        return values_K.new_zeros(self.num_rows).index_add(0, self.row_K, values_K)[self.row_K]

    def row_means(self, values_K: Tensor) -> Tensor:
        """(K,) for each token the mean of the values over its row."""
        return self.row_sums(values_K) / self.row_sums(torch.ones_like(values_K))


LossOutputs = tuple[Tensor, dict[str, Tensor]]  # (K,) loss of each token; metrics, see `metrics.py`
Loss = Callable[[LossInputs], LossOutputs]


class Surrogate(NamedTuple):
    """What a policy term found: (K,) losses with gradient, and beside them what the log wants to know.

    ratio_K  current / old, per token or row, without gradient
    low_K    bool: the ratio was below what the term allows, so it weighs more than its ratio or has lost its gradient
    high_K   bool: the ratio was above
    """

    loss_K: Tensor
    ratio_K: Tensor
    low_K: Tensor
    high_K: Tensor


def inputs_of(pack: PackedBatch, logprobs_K: Tensor, entropies_K: Tensor) -> LossInputs:
    """Return what a loss sees of a pack whose scored tokens have these log-probs and entropies."""
    return LossInputs(
        logprobs_K=logprobs_K,
        behaviour_logprobs_K=pack.scored(pack.logprobs_T),
        advantages_K=pack.scored(pack.advantages_T),
        entropies_K=entropies_K,
        row_K=pack.scored(pack.row_T),
        num_rows=len(pack.row_lengths),
        staleness_K=pack.scored(pack.staleness_T),
        reference_logprobs_K=None if pack.reference_logprobs_T is None else pack.scored(pack.reference_logprobs_T),
        proximal_logprobs_K=None if pack.proximal_logprobs_T is None else pack.scored(pack.proximal_logprobs_T),
    )


def clamped_exp(log_ratio_K: Tensor) -> Tensor:
    """The ratio, between e^-10 and e^10; beyond them it is constant and passes no gradient."""
    return log_ratio_K.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low}, {high}]")


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(known)}")
