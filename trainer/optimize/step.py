"""One optimiser step: forward and backward over the packs, a finite check, one update.

The denominator is counted over all packs before the first backward, so the gradient is that of one mean over
the whole step however the rows were packed. A step whose loss or gradient is not finite changes nothing but a
counter.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch
from trainer.optimize.losses import Loss, LossInputs
from trainer.optimize.optimizer import Optimizer
from trainer.policy.logprob import CHUNK_TOKENS, token_scores


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did.

    applied         False when the step was skipped because its loss or gradient was not finite
    loss            the weighted sum over tokens divided by the denominator
    means           the loss's own metrics, averaged over trained tokens
    grad_norm       before clipping
    lr              the rate of this update
    trained_tokens  tokens that the loss saw; num_tokens counts prompts too
    *_s             seconds spent in each phase
    """

    applied: bool
    loss: float
    means: dict[str, float]
    grad_norm: float
    lr: float
    num_packs: int
    num_rows: int
    num_tokens: int
    trained_tokens: int
    forward_s: float
    backward_s: float
    update_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / (self.forward_s + self.backward_s + self.update_s)


def train_step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    packs: Sequence[PackedBatch],
    loss: Loss,
    *,
    denominator: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> StepMetrics:
    """Take one optimiser step on the packs and say how it went.

    denominator  what the weighted sum over tokens is divided by; the sum of the trained tokens' weights
                 unless given (data-parallel ranks pass the sum over all of them)

    Raises ValueError when there is nothing to train on.
    """
    trained_tokens = sum(int(pack.trained_T.sum()) for pack in packs)
    if denominator is None:
        denominator = sum(float(pack.weights_T[pack.trained_T].double().sum()) for pack in packs)
    if trained_tokens == 0 or not denominator > 0:
        raise ValueError(
            f"{len(packs)} packs hold {trained_tokens} trained tokens and the denominator is {denominator}: "
            "wait for rollouts that can teach before taking a step"
        )
    losses: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    forward_s = backward_s = 0.0
    optimizer.zero_grad()
    for pack in packs:
        started_s = time.perf_counter()
        scores = token_scores(model, pack, chunk_tokens=chunk_tokens)
        loss_K, metrics = loss(
            LossInputs(
                logprobs_K=scores.logprobs_K,
                behaviour_logprobs_K=pack.logprobs_T[pack.trained_T],
                advantages_K=pack.advantages_T[pack.trained_T],
                entropies_K=scores.entropies_K,
            )
        )
        pack_loss = (loss_K * pack.weights_T[pack.trained_T]).sum() / denominator
        forward_end_s = time.perf_counter()
        pack_loss.backward()
        losses.append(pack_loss.detach())
        for name, value in metrics.items():
            sums[name] = sums[name] + value if name in sums else value
        forward_s += forward_end_s - started_s
        backward_s += time.perf_counter() - forward_end_s

    started_s = time.perf_counter()
    step_loss = math.fsum(float(value) for value in losses)
    grad_norm = optimizer.clip()
    lr = optimizer.lr
    applied = math.isfinite(step_loss) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
    else:
        optimizer.skip()
    return StepMetrics(
        applied=applied,
        loss=step_loss,
        means={name: float(value) / trained_tokens for name, value in sums.items()},
        grad_norm=grad_norm,
        lr=lr,
        num_packs=len(packs),
        num_rows=sum(len(pack.row_lengths) for pack in packs),
        num_tokens=sum(pack.num_tokens for pack in packs),
        trained_tokens=trained_tokens,
        forward_s=forward_s,
        backward_s=backward_s,
        update_s=time.perf_counter() - started_s,
    )
