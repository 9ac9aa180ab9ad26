"""AdamW with a schedule and a gradient clip, counting its own updates.

Only matrices decay: pulling norms and biases towards zero changes what the model computes without making it
simpler. Weights are float32, because an update of 1e-6 vanishes below one ulp of bfloat16; serving may be
sent a cast. The learning rate is a function of the number of updates alone, so a resumed run needs no
schedule state.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "cosine", "linear"]


class Optimizer:
    """AdamW over a model's trainable parameters.

    updates  how many have been applied;  skipped  how many were not, because a gradient was not finite
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_updates: int = 0,
        schedule: Schedule = "constant",
        total_updates: int | None = None,
        grad_norm_max: float = 1.0,
    ) -> None:
        """total_updates is where "cosine" and "linear" reach 0. Raises ValueError for weights that are not
        float32 (float64 is fine too) and for a schedule without an end."""
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
        matrices = [weight for weight in self.parameters.values() if weight.ndim >= 2]
        others = [weight for weight in self.parameters.values() if weight.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=lr,
            betas=betas,
            fused=True,
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
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.grad_norm_max))

    def step(self) -> None:
        """Apply the gradients and forget them."""
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        self._adam.step()
        self.zero_grad()
        self.updates += 1

    def skip(self) -> None:
        """Forget the gradients and count it."""
        self.zero_grad()
        self.skipped += 1

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Adam's state as live tensors, named "<parameter>/<moment>"; empty before the first update."""
        return {
            f"{name}/{key}": value
            for name, weight in self.parameters.items()
            for key, value in self._adam.state[weight].items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned, in this run or an earlier one.

        Raises ValueError, changing nothing, when a name or a shape belongs to other parameters.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, moment = key.rpartition("/")
            weight = self.parameters.get(name)
            if weight is None or (tensor.ndim > 0 and tensor.shape != weight.shape):
                expected = "no such parameter" if weight is None else f"shape {tuple(weight.shape)}"
                raise ValueError(f"optimiser state {key} has shape {tuple(tensor.shape)}, this model has {expected}")
            state.setdefault(name, {})[moment] = tensor.to(weight.device)
        self._adam.state.clear()
        for name, moments in state.items():
            self._adam.state[self.parameters[name]] = moments


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
