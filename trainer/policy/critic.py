"""The critic: what a policy may still expect to earn, before each token that it samples.

    critic = critic_of(policy)                          # a copy of its backbone, with weights of its own
    values = row_values(critic, packs, len(rows))       # before the step: V of every state
    value_step(critic, optimizer, packs, targets, values)

What always holds: the value at position t has seen the tokens up to t and no other, so it is that of the state *before*
token t + 1, of which the policy's log-prob there speaks; a row's values do not depend on what it is packed with; the
head is float32 and starts at zero, so a new critic says 0 of everything and PPO begins as REINFORCE without a baseline;
and no gradient of a value ever reaches the policy's weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch, idle_pack
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.parallel import packed, said_tensor
from trainer.optimize.scoring import of_each_pack
from trainer.optimize.step import on_device
from trainer.policy.logprob import hidden_states
from trainer.policy.model import has_adapter, load_policy
from trainer.ranks import everyone, lead, led, num_ranks

# N rows, L tokens of one of them, T packed tokens, K scored tokens, D model width.

CriticKind = Literal["own", "head"]


class Critic(torch.nn.Module):
    """A backbone and a linear head from its hidden states to one number."""

    def __init__(self, backbone: PreTrainedModel, *, shared: bool = False) -> None:
        """backbone  any causal LM, or the inside of one
        shared    it is the policy's: its hidden states are read without a gradient, and its weights are not this
                  module's. They count once, and move by the policy's loss alone
        """
        super().__init__()
        width = backbone.config.get_text_config().hidden_size
        device = next(backbone.parameters()).device
        self.head = torch.nn.Linear(width, 1, dtype=torch.float32, device=device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # that it has learnt in; kept by checkpoints
        self.backbone = None if shared else backbone
        self._trunk = (backbone,)  # in a tuple, where torch does not see a submodule

    def forward(self, pack: PackedBatch) -> Tensor:
        """Return (T,) the value of the state after token t of the pack, which is the one before token t + 1. float32."""
        shared = self.backbone is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not shared):
            hidden_TD = hidden_states(self._trunk[0], pack)
        # A copy: FSDP2 warns of views.
        return self.head(hidden_TD.to(self.head.weight.dtype)).squeeze(-1).clone()


def critic_of(policy: PreTrainedModel, *, kind: CriticKind = "own", directory: Path | None = None) -> Critic:
    """Return a new critic for a policy.

    kind       "own": a model of its own, which begins as a copy of the policy's backbone. It costs as much memory as the
               policy and learns whatever it needs. "head": a head on the policy's hidden states, which costs next to
               nothing and can only read what the policy happens to represent
    directory  of another model with the same token ids, a smaller one for instance, to be copied instead

    Raises ValueError for a directory that holds no model, for one with fewer token ids than the policy has, and for a
    policy that cannot be copied where none is given.
    """
    if directory is not None:
        if kind == "head":
            raise ValueError(f"a critic that is a head on the policy has no model of its own: leave {directory} out")
        model = load_policy(directory, device=str(next(policy.parameters()).device))
        ours, theirs = policy.config.get_text_config().vocab_size, model.config.get_text_config().vocab_size
        if theirs < ours:
            raise ValueError(
                f"{directory} knows {theirs} token ids and the policy {ours}: the critic reads the policy's tokens, so "
                "name a model with the same tokenizer"
            )
        return Critic(_backbone(model))
    if kind == "head":
        return Critic(policy, shared=True)
    if kind != "own":
        raise ValueError(f"critic={kind!r} is not known: use 'own' or 'head'")
    if not can_be_copied(policy):
        raise ValueError(
            "the policy has an adapter, or is kept in shards: name a directory for the critic to begin from"
        )
    backbone = copy.deepcopy(_backbone(policy))
    # A policy of which only a part is trained may still have a critic that learns whole.
    return Critic(backbone.requires_grad_(True))


def can_be_copied(policy: PreTrainedModel) -> bool:
    """False for one with an adapter, of which a copy would train the adapter alone, and for one that is kept in shards."""
    return not has_adapter(policy) and not isinstance(policy, FSDPModule)


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    """What computes the hidden states of a causal LM, without its head."""
    return cast(PreTrainedModel, model.base_model)


def row_values(critic: Critic, packs: Sequence[PackedBatch], num_rows: int) -> list[NDArray[np.float32]]:
    """Return, for each of the packed rows, (L,) the value of the state after each of its tokens, without a gradient.

    The value of the state in which token s was sampled is found at s − 1; that after the row's end at L − 1.
    """
    found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * num_rows
    for pack, values_T in zip(packs, pack_values(critic, packs), strict=True):
        for index, values_L in zip(pack.row_indices, values_T.split(pack.row_lengths), strict=True):
            found[index] = values_L.numpy()
    return found


def pack_values(critic: Critic, packs: Sequence[PackedBatch]) -> list[Tensor]:
    """Return for each pack (T,) what the critic says, float32, without a gradient, on the CPU.

    packs  on the leader of several ranks all of them, else this rank's
    """
    device = critic.head.weight.device
    return of_each_pack(critic, packs, lambda pack: critic(on_device(pack, device)).float(), "values")


def value_loss(
    values_K: Tensor, targets_K: Tensor, old_values_K: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """PPO's squared error of the values, clipped around the old ones: ½ max((V − G)², (V_old + clip(V − V_old) − G)²).

    clip     how far a value may move from the old one before it is no longer drawn on; 0: as far as it likes
    returns  (K,) the loss with its gradient, and (K,) True where the clip took the gradient away

    From OpenAI's baselines (ppo2), as TRL and verl have it; not in the paper (arXiv 1707.06347). It only does something
    where a batch is used several times, and whether it helps is disputed (arXiv 2006.05990 found that it does not).
    """
    if not clip >= 0:
        raise ValueError(f"value clip is {clip}: give how far a value may move in one batch, or 0 for no limit")
    errors_K = (values_K - targets_K).square()
    if clip == 0:
        return errors_K / 2, torch.zeros_like(errors_K, dtype=torch.bool)
    clipped_K = old_values_K + (values_K - old_values_K).clamp(-clip, clip)
    clipped_errors_K = (clipped_K - targets_K).square()
    return torch.maximum(errors_K, clipped_errors_K) / 2, clipped_errors_K > errors_K


def explained_variance(values: NDArray[np.floating], targets: NDArray[np.floating]) -> float | None:
    """Return 1 − Var(G − V) / Var(G): 1 for a critic that knows, 0 for one that says the same of everything.

    Below 0 it is worse than that. None where the targets are all equal, for then there is nothing to explain.
    """
    targets = np.asarray(targets, np.float64)
    spread = float(targets.var()) if len(targets) else 0.0
    if spread <= 1e-12:  # of rewards of order 1: rounding
        return None
    return 1.0 - float((targets - np.asarray(values, np.float64)).var()) / spread


@dataclass(frozen=True, slots=True)
class ValueMetrics:
    """What one step of the critic did. loss and clip_share are means over trained tokens, weighted as the policy's; grad_norm is before clipping."""

    applied: bool
    loss: float
    clip_share: float
    grad_norm: float


def value_step(
    critic: Critic,
    optimizer: Optimizer,
    packs: Sequence[PackedBatch],
    targets: Sequence[NDArray[np.floating]],
    old_values: Sequence[NDArray[np.floating]],
    *,
    clip: float = 0.2,
) -> ValueMetrics:
    """Take one step of the critic towards its targets, on the packs that the policy is trained on.

    targets      for each row (L,): what the state *before* each of its tokens was worth; read where trained
    old_values   for each row (L,): what the critic said before of the state *after* each token, as `row_values` has it

    A step whose loss or gradient is not finite changes nothing but the optimiser's counter.
    """
    laid = [_laid_out(pack, targets, old_values) for pack in packs]
    return packs_step(critic, optimizer, packs, [one for one, _ in laid], [one for _, one in laid], clip=clip)


def packs_step(
    critic: Critic,
    optimizer: Optimizer,
    packs: Sequence[PackedBatch],
    targets: Sequence[Tensor],
    old_values: Sequence[Tensor],
    *,
    clip: float,
) -> ValueMetrics:
    """As `value_step`, with targets and old values laid out as each pack's tokens are, (T,) by the token they are after.

    packs  on the leader of several ranks all of them, else this rank's, as many as every other rank has
    """
    ranks = num_ranks() if isinstance(critic, FSDPModule) else 1
    if led(critic) is not None:
        idle = -len(packs) % ranks
        packs = [*packs, *(idle_pack() for _ in range(idle))]
        targets, old_values = ([*some, *(torch.zeros(1) for _ in range(idle))] for some in (targets, old_values))
        lead(
            critic, "value_step", packs=[packed(pack) for pack in packs], targets=[said_tensor(one) for one in targets],
            old_values=[said_tensor(one) for one in old_values], clip=clip,
        )  # fmt: skip
        packs, targets, old_values = packs[::ranks], targets[::ranks], old_values[::ranks]
    denominator = _over_ranks(ranks, math.fsum(pack.denominator for pack in packs))
    if not denominator > 0:
        raise ValueError(f"{len(packs)} packs hold no trained tokens: there is nothing to value")
    device = critic.head.weight.device
    losses: list[Tensor] = []
    clipped = 0.0
    optimizer.zero_grad()
    for pack, targets_T, old_values_T in zip(packs, targets, old_values, strict=True):
        pack = on_device(pack, device)
        mask_T = pack.trained_T
        values_K = critic(pack)[mask_T]
        loss_K, clipped_K = value_loss(
            values_K,
            targets_T.to(values_K.device, values_K.dtype)[mask_T],
            old_values_T.to(values_K.device, values_K.dtype)[mask_T],
            clip=clip,
        )
        # FSDP averages gradients over ranks; what is wanted is their sum.
        pack_loss = (loss_K * pack.weights_T[mask_T]).sum() / (denominator / ranks)
        pack_loss.backward()
        losses.append(pack_loss.detach() / ranks)
        clipped += float((clipped_K * pack.weights_T[mask_T]).sum()) / denominator
    loss = _over_ranks(ranks, math.fsum(float(one) for one in losses))
    grad_norm = optimizer.clip()
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
    else:
        optimizer.skip()
    return ValueMetrics(applied, loss, _over_ranks(ranks, clipped), grad_norm)


def _laid_out(
    pack: PackedBatch, targets: Sequence[NDArray[np.floating]], old_values: Sequence[NDArray[np.floating]]
) -> tuple[Tensor, Tensor]:
    """Both of a pack's rows, (T,) each, by the token that they are after: targets come by the one that they are before."""
    return (
        torch.cat([torch.from_numpy(np.roll(targets[row], -1)) for row in pack.row_indices]),
        torch.cat([torch.from_numpy(old_values[row]) for row in pack.row_indices]),
    )


def _over_ranks(ranks: int, mine: float) -> float:
    """The sum of what all ranks that keep the critic together have; this process's own where it is alone."""
    return mine if ranks == 1 else math.fsum(everyone(mine))
