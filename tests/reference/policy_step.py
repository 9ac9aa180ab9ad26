"""Slow twin of the whole training step: every row alone, every token by itself, in float64, without packing.

It shares nothing with the trainer: the model runs transformers' eager attention on one unpacked row,
log-probs come from log_softmax over the full vocabulary, and the losses are those of `losses.py` beside this file.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_bus.adapters import Row
from tests.reference.losses import RowLoss, Token


def as_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in float64 with transformers' eager attention."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin


def row_logprobs(
    model: PreTrainedModel, row: Row, *, temperature: float | None = None
) -> list[tuple[Tensor, float, Tensor]]:
    """(log-prob, behaviour log-prob, entropy) of each trained token of one row."""
    logits_LV = model(input_ids=torch.tensor(row.token_ids.astype("int64"))[None], use_cache=False).logits[0]
    scored = []
    for t in range(1, len(row.token_ids)):
        if row.trained[t]:
            distribution_V = (logits_LV[t - 1] / float(temperature or row.temperatures[t])).log_softmax(-1)
            entropy = -(distribution_V.exp() * distribution_V).sum()
            scored.append((distribution_V[int(row.token_ids[t])], float(row.logprobs[t]), entropy))
    return scored


def step_loss(
    model: PreTrainedModel,
    rows: Sequence[Row],
    advantages: Sequence[float],
    row_loss: RowLoss,
    *,
    normalise: str = "token",
    fixed_length: int | None = None,
    temperature: float | None = None,
) -> Tensor:
    """One loss from all rows: of each, `row_loss` says what its trained tokens cost."""
    losses: list[tuple[Row, Tensor]] = []  # the losses of each row's tokens
    for row, advantage in zip(rows, advantages, strict=True):
        scored = row_logprobs(model, row, temperature=temperature)
        tokens = [Token(logprob, behaviour, float(advantage), entropy) for logprob, behaviour, entropy in scored]
        losses.append((row, torch.stack(row_loss(tokens))))
    if normalise == "token":
        return torch.cat([loss for _, loss in losses]).mean()
    if normalise == "sequence":
        return torch.stack([loss.mean() for _, loss in losses]).mean()
    members: dict[str, list[Tensor]] = {}
    for row, loss in losses:
        members.setdefault(row.group if normalise == "group" else row.rollout_id, []).append(loss)
    if fixed_length is not None:
        return torch.stack([torch.cat(parts).sum() / fixed_length for parts in members.values()]).mean()
    return torch.stack([torch.cat(parts).mean() for parts in members.values()]).mean()
