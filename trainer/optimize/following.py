"""What the ranks that do not lead run: the same policy, and the leader's orders.

What always holds: an order is carried out by the function that the leader called, so both make the same collective
calls; and what the leader's functions leave unsaid (losses, weights) is on every rank's disk and in its code already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lightning_bus import ConfigError
from trainer.config import PolicySection
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.parallel import loss_name, shard, unpacked
from trainer.optimize.step import train_step
from trainer.policy.build import build_policy
from trainer.policy.model import gathered_weights
from trainer.ranks import World, heard, take_the_lead


def policy_on(world: World, section: PolicySection, directory: Path) -> PreTrainedModel:
    """Load a run's policy, ready to be trained in this world: whole on one device, sharded over several.

    Raises what `build_policy` does, and ConfigError for an adapter on several ranks.
    """
    model = build_policy(section, directory, device=str(world.device))
    if world.size > 1:
        if section.lora_rank:
            raise ConfigError(
                f"policy.lora_rank is {section.lora_rank} and {world.size} ranks train: an adapter is trained on one "
                "device, where only its base must fit. Start without torchrun"
            )
        shard(model, world)
        take_the_lead(model, world)
    return model


def follow(world: World, model: PreTrainedModel, losses: Sequence[Callable[..., Any]]) -> None:
    """Do what the leader orders until it says that all is done. What every rank but the leader's runs.

    model   as the leader has it: the same weights, sharded
    losses  those that a step may be asked for
    """
    known = {loss_name(loss): loss for loss in losses}
    optimizer: Optimizer | None = None
    while True:
        what, given = heard(world)
        if what == "end":
            return
        if what == "optimizer":
            optimizer = Optimizer(model, **given)
        elif what == "load":
            checkpoint.load(Path(given["path"]), model, optimizer if given["optimizer"] else None)
        elif what == "weights":
            gathered_weights(model)
        else:
            assert optimizer is not None, f"{what} was ordered before an optimiser"
            if what == "save":
                checkpoint.save(Path(), 0, model, optimizer, {})
            else:
                assert what == "step", what
                packs = [unpacked(one) for one in given.pop("packs")[world.rank :: world.size]]
                train_step(model, optimizer, packs, known[given.pop("loss")], **given)
