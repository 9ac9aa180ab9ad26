"""PPO with a critic (arXiv 1707.06347): what a token earned is what came of it, beyond what the critic expected.

    values      ← the critic, of every state of the step's rows, before anything moves
    advantages  ← GAE over the tokens of each rollout; or TD(λ) over its turns, as [credit] rule = "value" says
    critic      ← towards advantages + values, clipped around the old values             `learn`
    policy      ← clipped importance-weighted policy gradient on whitened advantages     `updates`, `loss`

No groups are compared, so a task may be tried once, and rollouts that all succeed, or all fail, still teach the critic
what to expect. The critic and its optimiser are part of every checkpoint, so a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lightning_bus import ConfigError, CreditSection
from lightning_bus.adapters import Row, ScoredRollout
from trainer.algorithms.base import Earned, Setting
from trainer.algorithms.policy_gradients import PolicyLoss
from trainer.algorithms.token_credit import Bootstrap, Level, token_credit, turn_credit, whitened
from trainer.data.batch import PackedBatch, pack_rows
from trainer.optimize import losses
from trainer.optimize.checkpoint import Part
from trainer.optimize.following import critic_beside
from trainer.optimize.losses import PolicyTerm
from trainer.optimize.optimizer import Optimizer
from trainer.policy.critic import (
    Critic,
    CriticKind,
    ValueMetrics,
    explained_variance,
    row_values,
    value_step,
)
from trainer.ranks import num_ranks

# L tokens of a row.

_Key = tuple[str, int, tuple[bytes, ...]]  # a row: its rollout, attempt and calls
_Floats = NDArray[np.float32]


@dataclass(slots=True)
class _Running:
    """What changes while PPO runs. worth: of the step's rows, the targets and the old values, (L,) each."""

    setting: Setting
    critic: Critic
    optimizer: Optimizer
    worth: dict[_Key, tuple[_Floats, _Floats]] = field(default_factory=dict[_Key, tuple[_Floats, _Floats]])
    dealt: list[list[Row]] = field(default_factory=list[list[Row]])
    cut_off_share: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PPO(PolicyLoss):
    """Proximal policy optimisation, with values by a critic.

    critic               "own": a model of its own, from a copy of the policy's backbone. "head": a head on the policy's
                         hidden states, without a gradient into them, on one device only. Beside an adapter "own" begins
                         from the run's first policy. Where several processes train it is sharded as the policy is
    critic_model         directory of another model to begin the critic from, with the same token ids; "": the policy
    critic_lr            of the critic's AdamW, without a warm-up; the rest is as [train.rl] has it
    critic_warmup_steps  steps at the beginning in which only the critic learns
    gae_gamma            γ
    gae_lambda           λ; below 1 it trades the variance of what came later for the critic's bias
    level                what γ and λ are counted in: "token" or "turn". With [credit] rule "value" they are its own
    bootstrap            which rollouts were stopped rather than ended, so that what might have come is added, by the
                         critic: see `token_credit.trajectories`
    value_clip           how far a value moves from the old one in one step; 0: as far as it likes
    whiten               advantages of mean 0 and variance 1 over all trained tokens of the step
    epochs, minibatches  every row is used epochs times; each time the rollouts are dealt anew to so many updates
    critic_epochs        the same for the critic, which has more to learn from a row than the policy
    clip_low, clip_high  the ratio's, for the policy
    dual_clip            bounds the loss of a bad token that became likely: 3 in arXiv 1912.09729

    The other options are those of `PolicyLoss`. normalise is also what the critic's loss is a mean over.
    """

    critic: CriticKind = "own"
    critic_model: str = ""
    critic_lr: float = 1e-5
    critic_warmup_steps: int = 0
    gae_gamma: float = 1.0
    gae_lambda: float = 1.0
    level: Level = "token"
    bootstrap: Bootstrap = "length"
    value_clip: float = 0.2
    whiten: bool = True
    epochs: int = 1
    critic_epochs: int = 1
    minibatches: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    _running: _Running | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (
            ("critic_warmup_steps", 0), ("epochs", 1), ("critic_epochs", 1), ("minibatches", 1), ("value_clip", 0.0)
        ):  # fmt: skip
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}: it is at least {low}")
        for name in ("gae_gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it lies between 0 and 1")
        if not self.critic_lr > 0:
            raise ValueError(f"critic_lr is {self.critic_lr}: a critic that does not learn is of no use")

    # -- what the loop asks for, in its order

    def credited(self, credit: CreditSection) -> Self:
        """Take [credit] agents and truncated as they are, and rule "value" or none: the critic says what a call is worth."""
        default = CreditSection()
        if credit.rule not in ("value", default.rule):
            raise ConfigError(
                f"credit.rule = {credit.rule!r} does without a critic, and PPO is about one. Choose 'value' for TD(λ) over "
                "turns, or leave it out for GAE over tokens."
            )
        if credit.rule != "value" and (credit.gamma, credit.lambda_) != (default.gamma, default.lambda_):
            raise ConfigError(
                "credit.gamma and credit.lambda are those of rule = 'value'. Over tokens they are [train.rl.options] "
                "gae_gamma and gae_lambda."
            )
        if credit.estimator != default.estimator:
            raise ConfigError(
                f"credit.estimator = {credit.estimator!r} says how a group's rollouts are compared, and PPO compares none: "
                "leave it out."
            )
        over_tokens = (self.gae_gamma, self.gae_lambda, self.level)
        if credit.rule == "value" and over_tokens != (PPO.gae_gamma, PPO.gae_lambda, PPO.level):
            raise ConfigError(
                "with credit.rule = 'value' turns are discounted by credit.gamma and credit.lambda: leave gae_gamma, "
                "gae_lambda and level out of [train.rl.options]."
            )
        return replace(self, credit=credit)

    def prepare(self, setting: Setting) -> None:
        if num_ranks() > 1 and self.critic == "head":
            raise ConfigError(
                "train.rl.options.critic = 'head' reads the policy's hidden states, which are computed by "
                f"{num_ranks()} processes together: choose 'own', which they keep as they keep the policy."
            )
        directory = Path(self.critic_model) if self.critic_model else None
        try:
            critic = critic_beside(setting.model, self.critic, directory, setting.directory)
        except ValueError as exc:
            raise ConfigError(f"train.rl.options critic: {exc}") from exc
        optimizer = Optimizer(
            critic,
            lr=self.critic_lr,
            weight_decay=setting.train.rl.weight_decay,
            grad_norm_max=setting.train.rl.grad_norm_max,
        )
        object.__setattr__(self, "_running", _Running(setting, critic, optimizer))

    def parts(self) -> Mapping[str, Part]:
        return {"critic": (self._now.critic, self._now.optimizer)}

    def policy_term(self) -> PolicyTerm:
        return losses.ppo_clip(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip)

    def advantages(self, batch: Sequence[ScoredRollout]) -> Sequence[Earned]:
        now = self._now
        budget = now.setting.train.token_budget
        rows = [row for rollout in batch for row in rollout.rows if _readable(row, budget)]
        values = row_values(now.critic, self._packed(rows), len(rows)) if rows else []
        if self.credit.rule == "value":
            earned = turn_credit(
                batch,
                rows,
                values,
                gamma=self.credit.gamma,
                lambda_=self.credit.lambda_,
                bootstrap=self.bootstrap,
            )
        else:
            earned = token_credit(
                batch,
                rows,
                values,
                gamma=self.gae_gamma,
                lambda_=self.gae_lambda,
                level=self.level,
                bootstrap=self.bootstrap,
            )
        now.worth = {_key(row): (worth, told) for row, worth, told in zip(rows, earned.targets, values, strict=True)}
        now.cut_off_share = earned.cut_off / max(1, len(batch))
        return earned.advantages

    def learn(self, rows: Sequence[Row]) -> Mapping[str, float]:
        """Take the critic's steps, and decide upon which rows the policy takes its own."""
        now = self._now
        step = int(now.critic.steps)
        dealt = [self._deal(rows, (step, epoch)) for epoch in range(max(self.epochs, self.critic_epochs))]
        now.dealt = [part for parts in dealt[: self.epochs] for part in parts]
        now.critic.steps += 1
        described = self._described(rows)
        taken = [self._value_step(part) for parts in dealt[: self.critic_epochs] for part in parts]
        return {
            **described,
            "value_loss": float(np.mean([one.loss for one in taken])),
            "value_clip_share": float(np.mean([one.clip_share for one in taken])),
            "value_grad_norm": taken[-1].grad_norm,
            "value_skipped": sum(not one.applied for one in taken),
        }

    @property
    def policy_waits(self) -> bool:
        return int(self._now.critic.steps) < self.critic_warmup_steps

    def updates(self, rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
        """Return epochs × minibatches of the step's rows, whitened over all of them together."""
        if not self.whiten:
            return self._now.dealt
        even = {_key(row): row for row in whitened(rows)}
        return [[even[_key(row)] for row in part] for part in self._now.dealt]

    def num_updates(self, steps: int) -> int:
        return max(1, steps - self.critic_warmup_steps) * self.epochs * self.minibatches

    # -- how

    @property
    def _now(self) -> _Running:
        assert self._running is not None, "prepare comes first"
        return self._running

    def _packed(self, rows: Sequence[Row]) -> list[PackedBatch]:
        budget = self._now.setting.train.token_budget
        # The critic reads neither advantages nor temperatures.
        return pack_rows(
            rows,
            np.zeros(len(rows)),
            token_budget=budget,
            normalise=self.normalise,
            fixed_length=self.fixed_length,
            temperature=1.0,
        )

    def _value_step(self, rows: Sequence[Row]) -> ValueMetrics:
        targets, values = zip(*(self._now.worth[_key(row)] for row in rows), strict=True)
        return value_step(
            self._now.critic, self._now.optimizer, self._packed(rows), targets, values, clip=self.value_clip
        )

    def _deal(self, rows: Sequence[Row], seed: tuple[int, int]) -> list[list[Row]]:
        """Deal the rollouts to minibatches, whole, so that what is weighed by rollout stays together."""
        rollouts = list(dict.fromkeys(row.rollout_id for row in rows))
        count = min(self.minibatches, len(rollouts))
        if count <= 1:
            return [list(rows)]
        order = np.random.default_rng((self._now.setting.seed, *seed)).permutation(len(rollouts))
        part_of = {rollouts[k]: at % count for at, k in enumerate(order)}
        return [[row for row in rows if part_of[row.rollout_id] == part] for part in range(count)]

    def _described(self, rows: Sequence[Row]) -> dict[str, float]:
        """What the critic said before it learnt from these rows, against what came."""
        targets: list[_Floats] = []
        values: list[_Floats] = []
        for row in rows:
            targets_L, values_L = self._now.worth[_key(row)]
            targets.append(targets_L[row.trained])
            values.append(values_L[:-1][row.trained[1:]])
        all_targets, all_values = np.concatenate(targets), np.concatenate(values)
        explained = explained_variance(all_values, all_targets)
        return {
            "value_mean": float(all_values.mean()),
            "value_target_mean": float(all_targets.mean()),
            "value_target_std": float(all_targets.std()),
            "cut_off_share": self._now.cut_off_share,
            **({} if explained is None else {"explained_variance": explained}),
        }


def _readable(row: Row, tokens_max: int) -> bool:
    """Whether the critic can read it: `filters` will count the others under their reasons."""
    return len(row.token_ids) <= tokens_max and row.token_ids.min(initial=0) >= 0


def _key(row: Row) -> _Key:
    return row.rollout_id, row.attempt, row.span_ids
