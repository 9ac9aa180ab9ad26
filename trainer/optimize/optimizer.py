"""AdamW or Muon with a schedule and a gradient clip, counting its own updates.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that every direction
learns equally fast. It is for the matrices of the hidden layers: embeddings, head, norms and biases stay with AdamW.
Its updates are scaled to AdamW's size (Moonshot, arXiv 2502.16982: 0.2 · √max(rows, columns)), so lr and weight
decay mean the same under both. On sharded weights each rank gathers a matrix before it is orthogonalised.

Only matrices decay: pulling norms and biases towards zero changes what the model computes without making it
simpler. Weights are float32, because an update of 1e-6 vanishes below one ulp of bfloat16; serving may be
sent a cast. The learning rate is a function of the number of updates alone, so a resumed run needs no
schedule state.
"""

import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.ranks import lead

Schedule = Literal["constant", "cosine", "linear"]
Kind = Literal["adamw", "muon"]

MOMENTS: dict[Kind, frozenset[str]] = {
    "adamw": frozenset(("step", "exp_avg", "exp_avg_sq")),
    "muon": frozenset(("momentum_buffer",)),
}
HIDDEN_LAYER = re.compile(r"\.\d+\.")  # a weight of a numbered layer: model.layers.3.mlp.up_proj.weight


class Optimizer:
    """AdamW over a model's trainable parameters, or Muon over those that it is for and AdamW over the others.

    updates  how many have been applied;  skipped  how many were not, because a gradient was not finite
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        kind: Kind = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        warmup_updates: int = 0,
        schedule: Schedule = "constant",
        total_updates: int | None = None,
        grad_norm_max: float = 1.0,
    ) -> None:
        """betas are AdamW's and momentum Muon's; total_updates is where "cosine" and "linear" reach 0.

        Raises ValueError for weights that are not float32 (float64 is fine too), a schedule without an end, and a
        kind that is not known.
        """
        if kind not in MOMENTS:
            raise ValueError(f"optimizer={kind!r} is not known: use 'adamw' or 'muon'")
        lead(
            model, "optimizer", lr=lr, kind=kind, betas=betas, momentum=momentum, weight_decay=weight_decay,
            warmup_updates=warmup_updates, schedule=schedule, total_updates=total_updates, grad_norm_max=grad_norm_max,
        )  # fmt: skip
        learning_rate(0, lr=lr, warmup_updates=warmup_updates, schedule=schedule, total_updates=total_updates)
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        for name, weight in self.parameters.items():
            if weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} is {weight.dtype}: load the policy in float32 and send casts to the server")
        self.lr_peak = lr
        self.warmup_updates = warmup_updates
        self.schedule: Schedule = schedule
        self.total_updates = total_updates
        self.grad_norm_max = grad_norm_max
        self.updates = 0
        self.skipped = 0
        self.kinds: dict[str, Kind] = {
            name: "muon" if kind == "muon" and weight.ndim == 2 and HIDDEN_LAYER.search(name) else "adamw"
            for name, weight in self.parameters.items()
        }
        self._optimizers: dict[Kind, torch.optim.Optimizer] = {}
        others = [weight for name, weight in self.parameters.items() if self.kinds[name] == "adamw"]
        if others:
            self._optimizers["adamw"] = torch.optim.AdamW(
                [
                    {"params": [weight for weight in others if weight.ndim >= 2], "weight_decay": weight_decay},
                    {"params": [weight for weight in others if weight.ndim < 2], "weight_decay": 0.0},
                ],
                lr=lr,
                betas=betas,
                fused=True,
            )
        matrices = [weight for name, weight in self.parameters.items() if self.kinds[name] == "muon"]
        if matrices:
            self._optimizers["muon"] = torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
            )

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(
            self.updates,
            lr=self.lr_peak,
            warmup_updates=self.warmup_updates,
            schedule=self.schedule,
            total_updates=self.total_updates,
        )

    def clip(self) -> float:
        """Scale the gradients down to grad_norm_max and return the norm that they had."""
        norm = torch.nn.utils.get_total_norm(
            [weight.grad for weight in self.parameters.values() if weight.grad is not None]
        )
        found = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        # The norm is waited for anyway, to see whether it is finite; then gradients that are small enough need no pass.
        if found > self.grad_norm_max:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.grad_norm_max, norm)
        return found

    def step(self) -> None:
        """Apply the gradients and forget them."""
        lr = self.lr
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.zero_grad()
        self.updates += 1

    def skip(self) -> None:
        """Forget the gradients and count it."""
        self.zero_grad()
        self.skipped += 1

    def zero_grad(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as live tensors, named "<parameter>/<moment>"; empty before the first update."""
        return {
            f"{name}/{key}": value
            for name, weight in self.parameters.items()
            for key, value in self._optimizers[self.kinds[name]].state.get(weight, {}).items()
        }

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError when what `tensors` returned belongs to other parameters or to another kind of optimiser."""
        for key, tensor in tensors.items():
            name, _, moment = key.rpartition("/")
            weight = self.parameters.get(name)
            if weight is None or (tensor.ndim > 0 and tensor.shape != weight.shape):
                expected = "no such parameter" if weight is None else f"shape {tuple(weight.shape)}"
                raise ValueError(f"optimiser state {key} has shape {tuple(tensor.shape)}, this model has {expected}")
            if moment not in MOMENTS[self.kinds[name]]:
                raise ValueError(
                    f"optimiser state {key} is not {self.kinds[name]}'s: resume with the optimiser that the run began with"
                )

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned, in this run or an earlier one; whole tensors, whatever the shards are.

        Raises ValueError, changing nothing, when a name or a shape belongs to other parameters.
        """
        self.check_tensors(tensors)
        state: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, moment = key.rpartition("/")
            weight = self.parameters[name]
            state.setdefault(name, {})[moment] = shard_like(tensor, weight) if tensor.ndim else tensor.to(weight.device)
        for optimizer in self._optimizers.values():
            optimizer.state.clear()
        for name, moments in state.items():
            self._optimizers[self.kinds[name]].state[self.parameters[name]] = moments


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, placed as `like` is; the tensor itself where nothing is sharded."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    # Every rank has the whole tensor already, so nothing needs to be sent (src_data_rank=None).
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def learning_rate(
    update: int, *, lr: float, warmup_updates: int, schedule: Schedule, total_updates: int | None
) -> float:
    """The rate of update number `update`, counted from 0: a linear climb to lr, then the schedule's way down.

    Raises ValueError for an unknown schedule, and for one that ends without a total_updates past the warm-up.
    """
    if schedule not in ("constant", "cosine", "linear"):
        raise ValueError(f"schedule={schedule!r} is not known: use 'constant', 'cosine' or 'linear'")
    if schedule != "constant" and (total_updates is None or total_updates <= warmup_updates):
        raise ValueError(
            f"schedule={schedule!r} with total_updates={total_updates} and warmup_updates={warmup_updates}: "
            "it needs a total_updates beyond the warm-up"
        )
    if update < warmup_updates:
        return lr * (update + 1) / warmup_updates
    if schedule == "constant" or total_updates is None:
        return lr
    done = min(1.0, (update - warmup_updates) / (total_updates - warmup_updates))
    return lr * (1 - done) if schedule == "linear" else lr * (1 + math.cos(math.pi * done)) / 2
