"""The batch of a step: the next informative groups, and the rows that are trained of them.

    groups ─► scored ─► filters ─► Algorithm.advantages ─► rows, every token with what it earned ─► filters

What always holds: groups are taken in the log's order, whole; every drop is counted by its reason; advantages are known
before a row leaves, because a rollout whose rows are too long or too old still says how hard its task was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from lightning_bus import ConfigError, CreditSection, Status
from lightning_bus.adapters import FinishedRollout, RewardsSection, Row, ScoredRollout, Selection, scored
from trainer.algorithms.admission import keep_running_ahead
from trainer.algorithms.base import Algorithm, Earned
from trainer.data import curriculum
from trainer.data.filters import (
    drop_failed,
    drop_impossible,
    drop_long,
    drop_rolled_back,
    drop_stale,
    drop_unscored,
)
from trainer.data.stream import RolloutStream
from trainer.phases import Phases
from trainer.refusals import refuse_lengths
from trainer.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step may learn from.

    rollouts  of its informative groups
    seen      all rollouts that were looked at on the way
    dropped   why the others, and some of their calls and rows, were left out
    """

    rollouts: list[ScoredRollout] = field(default_factory=list[ScoredRollout])
    seen: list[FinishedRollout] = field(default_factory=list[FinishedRollout])
    dropped: Counter[str] = field(default_factory=Counter[str])

    @property
    def reward_mean(self) -> float:
        """Of the rollouts seen that have a reward; 0 where none has."""
        return float(np.mean([rollout.reward for rollout in self.seen if rollout.reward is not None] or [0.0]))

    @property
    def num_groups(self) -> int:
        return len({rollout.group for rollout in self.rollouts})


async def next_batch(
    session: Session, stream: RolloutStream, tasks: Sequence[Any], algorithm: Algorithm, phases: Phases
) -> Batch:
    """Return the next groups_per_step informative groups.

    Groups that teach nothing are replaced before the batch is counted (dynamic sampling, arXiv 2503.14476), but only
    refill_groups_max times: near the end almost every group is such, and a smaller batch now is worth more than a full
    one much later.
    """
    config, progress = session.train.rl, session.progress
    credit, rewards = session.run.section(CreditSection), session.run.section(RewardsSection)
    batch = Batch()
    all_scored: list[ScoredRollout] = []
    groups_left = config.groups_per_step + config.refill_groups_max
    missing = config.groups_per_step
    while missing and groups_left:
        with phases.timed("wait_rollouts_s"):
            groups = await stream.next_groups(min(missing, groups_left))
        groups_left -= len(groups)
        for group in groups:
            rollouts, dropped = scored(group.rollouts, credit, rewards, policy=session.policy.name)
            all_scored += rollouts
            succeeded = drop_failed(rollouts)
            current = drop_rolled_back(succeeded.items, first_version=progress.rolled_back)
            kept = algorithm.informative(current.items)
            for reasons in (dropped, succeeded.dropped, current.dropped, kept.dropped):
                batch.dropped.update(reasons)
            task = group.rollouts[0].labels.get("task_number")
            if config.curriculum and task is not None:
                rewards_N = [one.reward for one in current.items if one.reward is not None]
                curriculum.update(progress.curriculum, task, rewards_N, success=config.success_reward)
            if current.dropped or all(one.status is Status.CANCELLED for one in group.rollouts):
                groups_left += 1  # of those there are only as many as ran ahead of a rollback, or of a run's end
            batch.rollouts.extend(kept.items)
            batch.seen.extend(group.rollouts)
            if kept.items:
                missing -= 1
            else:
                progress.consumed_groups += 1
        # Only what taught nothing is replaced now. What is trained on makes room after the new version is out: a rollout
        # begun before that would be a version older than the bound when its turn comes. So would, on-policy, one that
        # this step no longer takes.
        await keep_running_ahead(session, tasks, None if config.staleness_max else min(missing, groups_left))
    _check_agents(session, credit, all_scored)
    return batch


def rows_and_advantages(
    batch: Batch, algorithm: Algorithm, *, version: int, staleness_max: int, tokens_max: int
) -> list[Row]:
    """Return the rows to train on, every token with what it earned; what is dropped is added to the batch's counts.

    version     of the policy that is about to be improved
    tokens_max  longer rows are dropped

    Raises ConfigError for rewards or advantages that do not go with the algorithm, and where every row is longer.
    """
    try:
        earned = algorithm.advantages(batch.rollouts)
        if len(earned) != len(batch.rollouts):
            raise ValueError(f"{len(earned)} advantages for {len(batch.rollouts)} rollouts: return one entry for each")
        of_calls = {
            rollout.rollout_id: _by_call(rollout, one) for rollout, one in zip(batch.rollouts, earned, strict=True)
        }
    except ValueError as exc:
        raise ConfigError(f"{type(algorithm).__name__} cannot say what these rollouts earned: {exc}") from exc
    rows_all = [row for rollout in batch.rollouts for row in rollout.rows]
    fresh = drop_stale(rows_all, trainer_version=version, staleness_max=staleness_max)
    refuse_lengths([len(row.token_ids) for row in fresh.items], tokens_max)
    short = drop_long(fresh.items, tokens_max=tokens_max)
    possible = drop_impossible(short.items)
    rows = drop_unscored(possible.items)
    for reasons in (fresh.dropped, short.dropped, possible.dropped, rows.dropped):
        batch.dropped.update(reasons)
    return [row.with_advantages(of_calls[row.rollout_id]) for row in rows.items]


def _by_call(rollout: ScoredRollout, earned: Earned) -> Mapping[bytes, float]:
    """Return what each call earned, by its span id: a number, or (R,) where each of its tokens has its own."""
    turns = rollout.transitions.turns if rollout.transitions is not None else []
    of_turns = [earned] * len(turns) if np.isscalar(earned) else cast(Sequence[Any], earned)
    if len(of_turns) != len(turns):
        raise ValueError(
            f"rollout {rollout.rollout_id} has {len(turns)} turns and was given {len(of_turns)} advantages"
        )
    return {turn.span_id: one for turn, one in zip(turns, of_turns, strict=True)}


def _check_agents(session: Session, credit: CreditSection, seen: Sequence[ScoredRollout]) -> None:
    """Tell when no call of a batch was one of the agents to train. In the first it ends the run: a name is misspelt."""
    made = [rollout.transitions for rollout in seen if rollout.transitions is not None]
    try:
        Selection.of(credit.agents).check({caller for one in made for caller in one.callers})
    except ConfigError as exc:
        if session.progress.step == 0:
            raise
        log.warning("step %d: %s", session.progress.step, exc)
