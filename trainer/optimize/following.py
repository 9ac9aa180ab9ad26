"""What the ranks that do not lead run: the same models, and the leader's orders.

    policy_on(world, section, directory)     the run's policy, or another one beside it; sharded where several ranks are
    reference_beside, critic_beside          further models, on all ranks that keep the policy together
    follow(world, model, losses)             every rank but the leader: do what it says until all is done

What always holds: an order is carried out by the function that the leader called, so both make the same collective
calls; and what the leader's functions leave unsaid (losses, weights) is on every rank's disk and in its code already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from transformers import PreTrainedModel

from trainer.config import PolicySection
from trainer.optimize import checkpoint
from trainer.optimize.checkpoint import Part
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.parallel import loss_name, shard, unpacked, unsaid_tensor
from trainer.optimize.scoring import logprobs_of
from trainer.optimize.step import train_step
from trainer.policy.build import build_policy
from trainer.policy.critic import Critic, CriticKind, can_be_copied, critic_of, pack_values, packs_step
from trainer.policy.lora import base_weights
from trainer.policy.model import gathered_weights, has_adapter, named_weights, whole
from trainer.ranks import POLICY, World, heard, lead, led, take_the_lead

REFERENCE, CRITIC = "reference", "critic"


def policy_on(world: World, section: PolicySection, directory: Path, name: str = POLICY) -> PreTrainedModel:
    """Load a run's policy, ready to be trained in this world: whole on one device, sharded over several.

    name  among the models of these ranks

    Raises what `build_policy` does.
    """
    if world.device.type == "cuda":  # of this thread; a rank that follows does it in another than the one it began in
        torch.cuda.set_device(world.device)
    model = build_policy(section, directory, device=str(world.device))
    if world.size > 1:
        shard(model, world)
        take_the_lead(model, world, name)
    return model


def reference_beside(model: PreTrainedModel, section: PolicySection, directory: Path) -> PreTrainedModel:
    """Load a policy that stays as it is, where the model is and as it is kept. Raises what `build_policy` does."""
    world = led(model) or World(device=next(model.parameters()).device)
    lead(model, REFERENCE, section=msgspec.to_builtins(section), directory=str(directory.absolute()))
    return policy_on(world, section, directory, REFERENCE).eval().requires_grad_(False)


def critic_beside(policy: PreTrainedModel, kind: CriticKind, directory: Path | None, first_policy: Path) -> Critic:
    """Return a new critic for a policy, as `critic_of` does, kept as the policy is: whole, or sharded by the same ranks.

    directory     of another model to begin from; None: the policy as it is now, or first_policy, which it once was,
                  where it has an adapter
    """
    world = led(policy)
    own = kind == "own" and not can_be_copied(policy)
    critic = critic_of(policy, kind=kind, directory=directory or (first_policy if own else None))
    if world is not None:
        begun = str((directory or first_policy).absolute())
        lead(policy, CRITIC, directory=begun, copied=directory is None and not has_adapter(policy))
        _shard_critic(critic, world, policy if directory is None and not has_adapter(policy) else None)
    return critic


def _shard_critic(critic: Critic, world: World, policy: PreTrainedModel | None) -> None:
    """Shard a critic; before that give it the weights of a policy that is kept in shards, if one is given."""
    backbone = cast(PreTrainedModel, critic.backbone)
    if policy is not None:
        own = backbone.state_dict(keep_vars=True)
        prefix = f"{policy.base_model_prefix}."
        with torch.no_grad():
            for name, tensor in named_weights(policy):
                full = whole(tensor)
                if name.startswith(prefix):
                    own[name.removeprefix(prefix)].copy_(full)
    shard(critic, world, backbone=backbone)
    take_the_lead(critic, world, CRITIC)


def follow(world: World, model: PreTrainedModel, losses: Sequence[Callable[..., Any]]) -> None:
    """Do what the leader orders until it says that all is done. What every rank but the leader's runs.

    model   as the leader has it: the same weights, sharded
    losses  those that a step may be asked for
    """
    following = _Following(world, model, {loss_name(loss): loss for loss in losses})
    while True:
        what, name, given = heard(world)
        if what == "end":
            return
        following.orders[what](name, **given)


class _Following:
    """The models that these ranks keep together, by name, and what may be ordered of one, each a method."""

    def __init__(self, world: World, model: PreTrainedModel, losses: dict[str, Callable[..., Any]]) -> None:
        self._world = world
        self._losses = losses
        self._models: dict[str, Any] = {POLICY: model}
        self._optimizers: dict[str, Optimizer] = {}
        self.orders: dict[str, Callable[..., Any]] = {
            "optimizer": self.optimizer, "load": self.load, "save": self.save, "weights": self.weights,
            "base": self.base, "step": self.step, "score": self.score, REFERENCE: self.reference, CRITIC: self.critic,
            "values": self.values, "value_step": self.value_step,
        }  # fmt: skip

    def optimizer(self, name: str, **options: Any) -> None:
        self._optimizers[name] = Optimizer(self._models[name], **options)

    def load(self, name: str, *, path: str, optimizer: bool, parts: Sequence[str]) -> None:
        given = self._optimizers[name] if optimizer else None
        checkpoint.load(Path(path), self._models[name], given, parts=self._parts(parts))

    def save(self, name: str, *, parts: Sequence[str]) -> None:
        checkpoint.save(Path(), 0, self._models[name], self._optimizers[name], {}, parts=self._parts(parts))

    def weights(self, name: str) -> None:
        gathered_weights(self._models[name])

    def base(self, name: str) -> None:
        base_weights(self._models[name])

    def step(self, name: str, *, packs: Sequence[Any], loss: str, **options: Any) -> None:
        train_step(self._models[name], self._optimizers[name], self._mine(packs), self._losses[loss], **options)

    def score(self, name: str, *, packs: Sequence[Any], with_adapter: bool) -> None:
        logprobs_of(self._models[name], self._mine(packs), with_adapter=with_adapter)

    def reference(self, name: str, *, section: dict[str, Any], directory: str) -> None:
        of = msgspec.convert(section, PolicySection)
        self._models[REFERENCE] = policy_on(self._world, of, Path(directory), REFERENCE).requires_grad_(False)

    def critic(self, name: str, *, directory: str, copied: bool) -> None:
        policy = self._models[name]
        critic = critic_of(policy, directory=Path(directory))
        _shard_critic(critic, self._world, policy if copied else None)
        self._models[CRITIC] = critic

    def values(self, name: str, *, packs: Sequence[Any]) -> None:
        pack_values(self._models[name], self._mine(packs))

    def value_step(
        self, name: str, *, packs: Sequence[Any], targets: Sequence[Any], old_values: Sequence[Any], clip: float
    ) -> None:
        of_rank = slice(self._world.rank, None, self._world.size)
        packs_step(
            self._models[name],
            self._optimizers[name],
            self._mine(packs),
            [unsaid_tensor(one) for one in targets[of_rank]],
            [unsaid_tensor(one) for one in old_values[of_rank]],
            clip=clip,
        )

    def _mine(self, packs: Sequence[Any]) -> list[Any]:
        return [unpacked(one) for one in packs[self._world.rank :: self._world.size]]

    def _parts(self, names: Sequence[str]) -> dict[str, Part]:
        return {name: (self._models[name], self._optimizers[name]) for name in names}
