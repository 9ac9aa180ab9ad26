"""What an algorithm is: one class of two methods. The loop (`rl.py`) is the same for all of them.

    class Mine(Algorithm):
        def advantages(self, batch):           # what each model call earned, for every rollout of the step
            return [rollout.total - 0.5 for rollout in batch]

        def loss(self, inputs):                # what to minimise, for each trained token of a pack
            return -inputs.advantages_K * inputs.logprobs_K, {}

In RUN.toml: `[train.rl] algorithm = "mine:Mine"`; in Python: `Trainer(algorithm=Mine())`.

Everything else has a default, so a class says only what is special about it. What always holds: `advantages` is asked
once a step and before anything is dropped for its age or length, with whole groups; `loss` is asked once for every
pack, neither averages nor weighs (see `optimize.losses`), and sees rows in any order. Both run on a thread of their own,
one at a time, while rollouts go on.

An algorithm with something of its own to learn, a critic for instance, has four more, in the order in which the loop
calls them:

    prepare(setting)      once, before anything is trained: build what is needed beside the policy
    parts()               after it, and at each checkpoint: modules with their optimisers, by name. They are durable
                          together with the policy, and restored in place where a checkpoint is taken up
    learn(rows)           each step, after `advantages` and before the policy's own step: take its own step
    updates(rows)         each step, after `learn`: the rows of each of the policy's updates; [rows] unless overridden
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lightning_bus import ConfigError, CreditSection
from lightning_bus.adapters import Row, ScoredRollout, call_advantages
from trainer.config import TrainSection
from trainer.data.batch import Normalise
from trainer.data.filters import Kept, drop_uninformative, drop_untrained
from trainer.optimize.checkpoint import Part
from trainer.optimize.losses import LossInputs, LossOutputs

# Of a rollout: one number for all that it said; or one entry for each of its turns (`rollout.transitions.turns`), which is
# one number for the tokens that this call sampled, or (R,) one for each of them.
Earned = float | NDArray[np.float32] | Sequence[float | NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where an algorithm finds itself.

    model      the policy, as it stands before the first step; it is trained in place, so copy what is to stay
    directory  of the first policy: a Hugging Face directory to build a second model from
    train      [train] of RUN.toml: token_budget, rl.lr, …
    seed       of the run
    """

    model: PreTrainedModel
    directory: Path
    train: TrainSection
    seed: int


class Algorithm(ABC):
    """One way to learn from rollouts. Subclasses give `advantages` and `loss`; the rest has defaults."""

    normalise: Normalise = "token"
    """What the loss of an update is a mean over; see `data.batch.pack_rows`."""

    fixed_length: int | None = None
    """Of normalise "fixed"."""

    @abstractmethod
    def advantages(self, batch: Sequence[ScoredRollout]) -> Sequence[Earned]:
        """Return what each rollout earned beyond what was to be expected, or what each of its calls or tokens did.

        batch    rollouts of whole groups that succeeded; `rollout.transitions.turns` are their calls, `rollout.rows`
                 the tokens, `rollout.episode` the rewards, `rollout.total` the return
        returns  one entry a rollout, see `Earned`

        Raises ValueError for rewards that it cannot take, which ends the run with that message.
        """

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Return (K,) what to minimise for each trained token, and sums over the tokens for metrics.jsonl, by name."""

    @property
    def wants_reference(self) -> bool:
        """True: `inputs.reference_logprobs_K` are what the policy said before its first step, scored once a row."""
        return False

    @property
    def wants_proximal(self) -> bool:
        """True: `inputs.proximal_logprobs_K` are what the policy says before this step's first update, once a row."""
        return False

    def informative(self, rollouts: Sequence[ScoredRollout]) -> Kept[ScoredRollout]:
        """Return the rollouts of those groups that teach something; others are replaced before the batch is counted.

        Here: groups of which some rollout has rows. One that compares within groups also drops those that agree.
        """
        return drop_untrained(rollouts)

    def credited(self, credit: CreditSection) -> Self:
        """Return this algorithm as [credit] of the run wants it. Raises ConfigError for what does not go together.

        Here: unchanged, for who computes advantages alone decides what [credit] says about them.
        """
        return self

    def prepare(self, setting: Setting) -> None:  # noqa: B027 - most have nothing to prepare
        """Build what is needed beside the policy."""

    def learn(self, rows: Sequence[Row]) -> Mapping[str, float]:
        """Learn from the rows that the policy is about to learn from, advantages on them; return metrics by name."""
        return {}

    @property
    def policy_waits(self) -> bool:
        """True, asked before `learn`, where only that may learn, a critic's warm-up: no new version of the policy."""
        return False

    def updates(self, rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
        """Return the rows of each of the policy's updates of this step, in order: several for minibatches and epochs.

        Each has a denominator of its own. The policy that sampled remains what all their ratios compare with.
        """
        return [rows]

    def num_updates(self, steps: int) -> int:
        """Return how many updates so many steps come to: where a schedule of the learning rate ends, unless it says."""
        return steps

    def parts(self) -> Mapping[str, Part]:
        """Return what a checkpoint keeps beside the policy: modules with their optimisers; counters are buffers."""
        return {}


def compared(batch: Sequence[ScoredRollout], credit: CreditSection, **how: str) -> list[NDArray[np.float32]]:
    """Return (T,) for each rollout what its calls earned by the rule of [credit], compared as `how` says.

    how  estimator and scale, as in `lightning_bus.adapters.call_advantages`
    """
    episodes = [rollout.episode for rollout in batch if rollout.episode is not None]
    if len(episodes) != len(batch):
        raise ValueError(f"{len(batch) - len(episodes)} of {len(batch)} rollouts hold nothing that could have earned")
    options = {
        "rule": credit.rule, "relevance": credit.relevance, "gamma": credit.gamma, "lambda_": credit.lambda_,
        "estimator": credit.estimator, **how,
    }  # fmt: skip
    return call_advantages(episodes, **options)  # pyright: ignore[reportArgumentType] - names and values are the config's


def drop_agreeing(rollouts: Sequence[ScoredRollout], credit: CreditSection) -> Kept[ScoredRollout]:
    """Drop groups without rows and those whose rollouts all earned the same: compared with each other, nobody differs."""
    kept = drop_untrained(rollouts)
    differing = drop_uninformative(kept.items, by_turn=credit.rule != "identical")
    return Kept(differing.items, kept.dropped + differing.dropped)


def refuse_values(credit: CreditSection, algorithm: str) -> None:
    """Raise ConfigError where [credit] wants the values of a critic that this algorithm has not."""
    if credit.rule == "value":
        raise ConfigError(
            f"credit.rule = 'value' needs a critic, and {algorithm} trains none. Choose identical, turn or "
            'leave_one_out, or [train.rl] algorithm = "ppo"; lightning_bus.adapters.call_advantages takes the values '
            "of a critic of your own."
        )
