"""Slow twin of the whole training step: every row alone, every token by itself, in float64, without packing.

It shares nothing with the trainer: the model runs transformers' eager attention on one unpacked row,
log-probs come from log_softmax over the full vocabulary, and the losses are written out token by token from
the papers.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_bus.adapters import Row

TokenLoss = Callable[[Tensor, float, float], Tensor]  # current log-prob, behaviour log-prob, advantage


def as_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in float64 with transformers' eager attention."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin


def row_logprobs(
    model: PreTrainedModel, row: Row, *, temperature: float | None = None
) -> list[tuple[Tensor, float, float]]:
    """(log-prob, behaviour log-prob, entropy) of each trained token of one row."""
    logits_LV = model(input_ids=torch.tensor(row.token_ids.astype("int64"))[None], use_cache=False).logits[0]
    scored = []
    for t in range(1, len(row.token_ids)):
        if row.trained[t]:
            distribution_V = (logits_LV[t - 1] / float(temperature or row.temperatures[t])).log_softmax(-1)
            entropy = -float((distribution_V.exp() * distribution_V).detach().sum())
            scored.append((distribution_V[int(row.token_ids[t])], float(row.logprobs[t]), entropy))
    return scored


def step_loss(
    model: PreTrainedModel,
    rows: Sequence[Row],
    advantages: Sequence[float],
    token_loss: TokenLoss,
    *,
    normalise: str = "token",
    temperature: float | None = None,
) -> Tensor:
    """The mean of token_loss over all trained tokens, or over rollouts of the mean over each one's tokens."""
    by_rollout: dict[str, list[Tensor]] = {}
    for row, advantage in zip(rows, advantages, strict=True):
        losses = by_rollout.setdefault(row.rollout_id, [])
        for logprob, behaviour, _ in row_logprobs(model, row, temperature=temperature):
            losses.append(token_loss(logprob, behaviour, float(advantage)))
    if normalise == "rollout":
        return torch.stack([torch.stack(losses).mean() for losses in by_rollout.values()]).mean()
    return torch.stack([loss for losses in by_rollout.values() for loss in losses]).mean()


def sft_token(logprob: Tensor, behaviour: float, advantage: float) -> Tensor:
    return -logprob


def ppo_clip_token(clip_low: float, clip_high: float) -> TokenLoss:
    def loss(logprob: Tensor, behaviour: float, advantage: float) -> Tensor:
        ratio = _ratio(logprob, behaviour)
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        return -torch.minimum(ratio * advantage, clipped * advantage)

    return loss


def cispo_token(clip_low: float, clip_high: float) -> TokenLoss:
    def loss(logprob: Tensor, behaviour: float, advantage: float) -> Tensor:
        weight = min(max(float(_ratio(logprob.detach(), behaviour)), 1 - clip_low), 1 + clip_high)
        return -weight * advantage * logprob

    return loss


def reinforce_token(ratio_max: float) -> TokenLoss:
    def loss(logprob: Tensor, behaviour: float, advantage: float) -> Tensor:
        return -min(float(_ratio(logprob.detach(), behaviour)), ratio_max) * advantage * logprob

    return loss


def _ratio(logprob: Tensor, behaviour: float) -> Tensor:
    log_ratio = logprob - behaviour
    beyond = float(log_ratio.detach())
    return torch.exp(log_ratio) if abs(beyond) <= 10 else torch.tensor(math.exp(math.copysign(10, beyond)))
