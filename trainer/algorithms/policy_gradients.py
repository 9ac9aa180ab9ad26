"""The algorithms without a critic, each a name for a few choices.

    how rollouts are compared     estimator, scale
    what is minimised             the policy term and its clip · corrections · KL · entropy bonus
    what the loss is a mean over  normalise

Every choice is an option, so that one can be changed and the others kept: `GRPO(scale="none", tis=2.0)`, or in RUN.toml
`algorithm = "grpo"` and `[train.rl.options]`. Defaults are the paper's unless a comment says why not. [credit] says whose
calls are trained and how a rollout's return is told to them (rule, relevance, gamma).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from lightning_bus import ConfigError, CreditSection
from lightning_bus.adapters import ScoredRollout
from trainer.algorithms.base import Algorithm, compared, drop_agreeing, refuse_values
from trainer.data.batch import Normalise
from trainer.data.filters import Kept
from trainer.optimize import losses
from trainer.optimize.losses import Correction, Kl, KlShaping, Loss, LossInputs, LossOutputs, PolicyTerm

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "maxrl"]
Scale = Literal["none", "std"]
Band = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Algorithm):
    """What is minimised: a policy term that subclasses name, with corrections, KL and entropy beside it.

    normalise        what the loss is a mean over: token, sequence, rollout, group, fixed; see `data.batch.pack_rows`
    fixed_length     of normalise "fixed"
    tis              truncated importance sampling, with this cap           ┐
    icepop           drop tokens whose ratio is outside these two numbers   │ corrections of what lies between engine and
    geometric_mask   drop rows whose mean ratio is outside these two        │ trainer, old weights and new: see
    off_policy_mask  drop what is bad of rows further off than this         ┘ optimize/losses/correction.py
    proximal         score rows with the trainer's own weights before the first update and clip against that, so that
                     corrections have the rest to themselves (decoupled PPO, arXiv 2505.24298); one more forward pass
    kl               KL to the policy before its first step, or to the one that sampled, as a loss: Kl(coefficient=1e-3)
    kl_shaping       the same inside the advantage: KlShaping(coefficient=1e-3)
    entropy_bonus    nats of entropy are worth this much loss
    """

    normalise: Normalise = "token"
    fixed_length: int | None = None
    tis: float | None = None
    icepop: Band | None = None
    geometric_mask: Band | None = None
    off_policy_mask: float | None = None
    proximal: bool = False
    kl: Kl | None = None
    kl_shaping: KlShaping | None = None
    entropy_bonus: float = 0.0
    credit: CreditSection = field(default=CreditSection(), repr=False)

    def __post_init__(self) -> None:
        if self.kl is not None and self.kl_shaping is not None:
            raise ValueError("kl and kl_shaping hold the policy near twice: choose one")
        if (self.fixed_length is not None) != (self.normalise == "fixed"):
            raise ValueError(f"fixed_length is {self.fixed_length} and normalise {self.normalise!r}: they go together")
        self._minimised  # noqa: B018 - what cannot be composed is told now rather than in the first step

    @abstractmethod
    def policy_term(self) -> PolicyTerm:
        """Return what makes good tokens likelier: one of `trainer.optimize.losses`, or your own."""

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return self._minimised(inputs)

    @property
    def wants_reference(self) -> bool:
        return any(one is not None and one.to == "reference" for one in (self.kl, self.kl_shaping))

    @property
    def wants_proximal(self) -> bool:
        return self.proximal

    @cached_property
    def _minimised(self) -> Loss:
        corrections: list[Correction] = []
        if self.tis is not None:
            corrections.append(losses.tis(cap=self.tis))
        if self.icepop is not None:
            corrections.append(losses.icepop(low=self.icepop[0], high=self.icepop[1]))
        if self.geometric_mask is not None:
            corrections.append(losses.geometric_mask(low=self.geometric_mask[0], high=self.geometric_mask[1]))
        if self.off_policy_mask is not None:
            corrections.append(losses.off_policy_mask(delta=self.off_policy_mask))
        return losses.compose(
            self.policy_term(),
            corrections=corrections,
            kl=self.kl or self.kl_shaping,
            entropy_bonus=self.entropy_bonus,
        )


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(PolicyLoss):
    """Rollouts compared with each other, and a policy term that subclasses name.

    estimator        how rollouts are compared: see lightning_bus/adapters/advantages.py
    scale            "std" divides what the estimator grpo gives by the group's spread

    The other options are those of `PolicyLoss`.
    """

    estimator: Estimator = "grpo"
    scale: Scale = "none"

    def advantages(self, batch: Sequence[ScoredRollout]) -> Sequence[NDArray[np.float32]]:
        return compared(batch, self.credit, estimator=self.estimator, scale=self.scale)

    def informative(self, rollouts: Sequence[ScoredRollout]) -> Kept[ScoredRollout]:
        """Drop groups that agree, unless rollouts are compared with the whole batch: then such a group does teach."""
        if self.estimator == "reinforce++" and self.credit.rule != "leave_one_out":
            return super().informative(rollouts)
        return drop_agreeing(rollouts, self.credit)

    def credited(self, credit: CreditSection) -> Self:
        name = type(self).__name__
        refuse_values(credit, name)
        if credit.estimator not in (CreditSection().estimator, self.estimator):
            raise ConfigError(
                f"credit.estimator is {credit.estimator!r} and {name}'s is {self.estimator!r}. Say it in one place: "
                "[train.rl.options] estimator, or leave [train.rl] algorithm out."
            )
        return replace(self, credit=credit)


@dataclass(frozen=True, kw_only=True)
class GRPO(PolicyGradient):
    """Group-relative advantages over their spread, and PPO's clip (arXiv 2402.03300).

    A mean over rollouts, which is the paper's mean over sequences also where a rollout has several rows. Without the
    paper's KL term, which later work left out; with it: kl=Kl(coefficient=0.04, kind="k3").

    clip_low, clip_high  the ratio is held to 1 − clip_low … 1 + clip_high
    dual_clip            bounds the loss of a bad token that became likely: 3 in arXiv 1912.09729
    """

    scale: Scale = "std"
    normalise: Normalise = "rollout"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def policy_term(self) -> PolicyTerm:
        return losses.ppo_clip(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO without its two biases: not divided by the spread, nor by each response's length (arXiv 2503.20783)."""

    scale: Scale = "none"
    normalise: Normalise = "fixed"
    fixed_length: int | None = 1024


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO with a wider upper clip and a mean over tokens (arXiv 2503.14476).

    Its dynamic sampling is the loop's (refill_groups_max); its soft penalty for length is a reward hook's affair.
    """

    normalise: Normalise = "token"
    clip_high: float = 0.28


@dataclass(frozen=True, kw_only=True)
class GSPO(PolicyGradient):
    """One ratio a sequence, so that it is clipped as a whole (arXiv 2507.18071).

    Its clip is narrow because a mean over tokens moves little, and the paper's is for data of the newest weights: widen
    it where rollouts run ahead, or almost everything is clipped.
    """

    scale: Scale = "std"
    normalise: Normalise = "rollout"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    level: Literal["sequence", "sequence_token"] = "sequence"

    def policy_term(self) -> PolicyTerm:
        return losses.gspo(clip_low=self.clip_low, clip_high=self.clip_high, level=self.level)


@dataclass(frozen=True, kw_only=True)
class CISPO(PolicyGradient):
    """REINFORCE under a clipped ratio that no token's gradient dies of (MiniMax-M1, arXiv 2506.13585).

    Not divided by the group's spread, where the paper is: that blows up groups that are almost constant (arXiv
    2503.20783).
    """

    clip_low: float = 1.0
    clip_high: float = 3.0
    level: Literal["token", "sequence"] = "token"

    def policy_term(self) -> PolicyTerm:
        return losses.cispo(clip_low=self.clip_low, clip_high=self.clip_high, level=self.level)


@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyGradient):
    """REINFORCE with truncated importance weights: RLOO (arXiv 2402.14740), or by `estimator` REINFORCE++ (2501.03262).

    ratio_max  None: no weights, for rollouts of the current policy or together with a correction
    """

    estimator: Estimator = "rloo"
    ratio_max: float | None = 2.0
    level: Literal["token", "sequence"] = "token"

    def policy_term(self) -> PolicyTerm:
        return losses.reinforce(ratio_max=self.ratio_max, level=self.level)


@dataclass(frozen=True, kw_only=True)
class DPPO(PolicyGradient):
    """A trust region on how far a token's probability moved, where PPO looks at its ratio (arXiv 2602.04879)."""

    divergence: Literal["tv", "kl"] = "tv"
    mask_low: float | None = None
    mask_high: float | None = None
    ratio_max: float = 20.0

    def policy_term(self) -> PolicyTerm:
        return losses.dppo(
            divergence=self.divergence, mask_low=self.mask_low, mask_high=self.mask_high, ratio_max=self.ratio_max
        )
