"""Forward passes without gradients, shared by the ranks that keep a model together: log-probs, values.

    (logprobs_K, …) = logprobs_of(model, packs)      for each pack (K,), what the model says of its trained tokens

What always holds: where the model is sharded all ranks compute at the same time, equally many packs each, and each is
told the results of all, in the order of the packs; where it is not, whoever calls computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch, idle_pack
from trainer.optimize.parallel import packed, run, said_tensor, unsaid_tensor
from trainer.optimize.step import on_device
from trainer.policy.logprob import token_scores
from trainer.policy.lora import without_adapter
from trainer.ranks import everyone, lead, led, num_ranks

# K trained tokens of a pack.


def logprobs_of(model: PreTrainedModel, packs: Sequence[PackedBatch], *, with_adapter: bool = True) -> list[Tensor]:
    """Return for each pack (K,) the log-probs of its trained tokens at their temperatures, on the CPU.

    packs         on the leader of several ranks all of them, else this rank's, as many as every other rank has
    with_adapter  False: what the model would say without the adapter that it has
    """
    device = next(model.parameters()).device

    def score(pack: PackedBatch) -> Tensor:
        return run(model, token_scores, model, on_device(pack, device)).logprobs_K

    with nullcontext() if with_adapter else without_adapter(model):
        return of_each_pack(model, packs, score, "score", with_adapter=with_adapter)


def of_each_pack(
    model: torch.nn.Module,
    packs: Sequence[PackedBatch],
    compute: Callable[[PackedBatch], Tensor],
    order: str,
    **given: Any,
) -> list[Tensor]:
    """Return what `compute` makes of each pack, one tensor without a gradient each, on the CPU.

    order, given  what the leader tells the other ranks, beside their packs, for them to call the same
    """
    count, ranks = len(packs), num_ranks()
    if led(model) is not None:
        packs = [*packs, *(idle_pack() for _ in range(-len(packs) % ranks))]
        lead(model, order, packs=[packed(pack) for pack in packs], **given)
        packs = packs[::ranks]
    with torch.no_grad():
        mine = [compute(pack).detach().cpu() for pack in packs]
    if not isinstance(model, FSDPModule):
        return mine
    # A forward pass leaves the outermost weights gathered for a backward pass, which does not come here; and they are
    # about to change.
    model.reshard()
    told = everyone([said_tensor(one) for one in mine])
    return [unsaid_tensor(of_rank[turn]) for turn in range(len(mine)) for of_rank in told][:count]
