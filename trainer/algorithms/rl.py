"""Asynchronous policy-gradient training: GRPO's group-relative advantages, on rollouts that never wait for a step.

    while not done:
        keep rollouts running ahead of the trainer, but not further than staleness allows
        groups      ← complete groups, in the log's order; those whose rewards are all equal are replaced
        advantages  ← reward − mean reward of the task's group            (one number a rollout)
        rows        ← recorded token ids and log-probs, merged by prefix  (never re-tokenised)
        loss        ← clipped importance-weighted policy gradient, one denominator a step
        step, checkpoint, publish version + 1, push

Departs from GRPO (arXiv 2402.03300) where later work found better: no division by the group's spread and a mean over
all tokens of the step (Dr. GRPO, arXiv 2503.20783; DAPO, arXiv 2503.14476), no KL term, behaviour log-probs as the
engine recorded them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_bus.adapters import FinishedRollout, Row
from trainer.algorithms.evaluate import evaluate
from trainer.config import RlSection
from trainer.data.advantages import group_advantages
from trainer.data.batch import pack_rows
from trainer.data.filters import ScoredRollout, drop_failed, drop_long, drop_stale, drop_uninformative, drop_unscored
from trainer.data.stream import TRAIN, RolloutStream, scored, submission
from trainer.optimize import losses
from trainer.optimize.losses import Loss
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.session import Session, step_line, trained_record


async def reinforce(session: Session, stream: RolloutStream, tasks: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Train until `steps_max`, or until the reward of the last steps reaches `stop_reward`."""
    config, progress = session.train.rl, session.progress
    optimizer = Optimizer(
        session.model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_updates=config.warmup_updates,
        grad_norm_max=config.grad_norm_max,
    )
    session.restore_optimizer(optimizer)
    loss = _loss(config)
    every = session.train.eval.every_steps
    while progress.step < config.steps_max and not _good_enough(progress.rewards, config):
        # Before the next step rather than after the last: a trainer that was killed in between still owes it.
        if every and progress.step and progress.step % every == 0:
            await evaluate(session, stream, held_out)
        await keep_running_ahead(session, tasks)
        batch, rollouts, counts = await next_batch(session, stream, tasks)
        rows, advantages = rows_and_advantages(batch, config, progress.version, session.train.token_budget, counts)
        learnt: dict[str, float] = {}
        if rows:
            packs = pack_rows(rows, advantages, token_budget=session.train.token_budget, normalise=config.normalise)
            learnt = step_line(train_step(session.model, optimizer, packs, loss)) | _staleness(rows, progress.version)
            # The log must show that agents met this version before it is replaced; new rollouts are on their way.
            await stream.wait_version_called(progress.version)
            progress.parent, progress.version = progress.version, progress.version + 1
        reward_mean = float(np.mean([rollout.reward for rollout in rollouts if rollout.reward is not None] or [0.0]))
        progress.step += 1
        progress.consumed_groups += len({rollout.group for rollout in batch})
        progress.rewards.append(reward_mean)
        progress.trained = trained_record(rows)
        progress.stream = stream.saved_state()
        progress.line = session.note(
            "rl", reward_mean=reward_mean, rollouts=len(rollouts), rows=len(rows), dropped=dict(counts), **learnt
        )
        session.checkpoint(optimizer)
        if rows:
            await session.publish()
        session.tell(progress.line)
    progress.phase = "done"
    session.checkpoint(optimizer)


async def keep_running_ahead(session: Session, tasks: Sequence[Any]) -> None:
    """Submit groups until as many are on their way as staleness allows: this step's, and staleness_max steps more.

    Groups are numbered, and the number decides task and rollout ids; a resumed trainer submits the same ones again.
    """
    config, progress = session.train.rl, session.progress
    ahead = progress.submitted_groups - progress.consumed_groups
    wanted = (config.staleness_max + 1) * config.groups_per_step - ahead
    await submit_groups(session, tasks, max(0, wanted))


async def submit_groups(session: Session, tasks: Sequence[Any], count: int) -> None:
    config, progress = session.train.rl, session.progress
    first = progress.submitted_groups
    # The teacher's tasks come last: on what the policy has imitated it no longer disagrees with itself, and a group
    # that agrees teaches nothing.
    unseen = session.train.sft.rollouts
    submissions = [
        submission(
            f"train-{group:05d}-{member}",
            tasks[(unseen + group) % len(tasks)],
            TRAIN,
            group=f"train-{group:05d}",
            model=session.policy.name,
            overrides={"temperature": config.temperature},
        )
        for group in range(first, first + count)
        for member in range(config.group_size)
    ]
    if submissions:
        await session.bus.submit(submissions)
    progress.submitted_groups = first + count


async def next_batch(
    session: Session, stream: RolloutStream, tasks: Sequence[Any]
) -> tuple[list[ScoredRollout], list[FinishedRollout], Counter[str]]:
    """Return the rollouts of the next step's informative groups, all rollouts seen on the way, and why others were dropped.

    Groups whose rewards were all equal teach nothing and are replaced before the batch is counted (dynamic sampling,
    arXiv 2503.14476), but only refill_groups_max times: near the end almost every group is such, and a smaller batch
    now is worth more than a full one much later.
    """
    config, progress = session.train.rl, session.progress
    informative: list[ScoredRollout] = []
    seen: list[FinishedRollout] = []
    counts: Counter[str] = Counter()
    groups_left = config.groups_per_step + config.refill_groups_max
    missing = config.groups_per_step
    while missing and groups_left:
        groups = await stream.next_groups(min(missing, groups_left))
        groups_left -= len(groups)
        for group in groups:
            rollouts, dropped = scored(group.rollouts)
            counts += dropped
            succeeded = drop_failed(rollouts)
            kept = drop_uninformative(succeeded.items)
            counts += succeeded.dropped + kept.dropped
            informative += kept.items
            seen += group.rollouts
            if kept.items:
                missing -= 1
            else:
                progress.consumed_groups += 1
        # Only what taught nothing is replaced now. What is trained on makes room after the new version is out: a rollout
        # begun before that would be a version older than the bound when its turn comes.
        await keep_running_ahead(session, tasks)
    return informative, seen, counts


def rows_and_advantages(
    batch: Sequence[ScoredRollout], config: RlSection, version: int, tokens_max: int, counts: Counter[str]
) -> tuple[list[Row], list[float]]:
    """Return the rows to train on and each row's advantage; what is dropped is added to `counts`.

    Advantages come first: a rollout whose rows are too long or too old still says how hard its task was.
    """
    rewards = [rollout.reward for rollout in batch if rollout.reward is not None]
    advantages = group_advantages(rewards, [rollout.group for rollout in batch], scale=config.scale)
    advantage_of = {rollout.rollout_id: float(advantage) for rollout, advantage in zip(batch, advantages, strict=True)}
    rows_all = [row for rollout in batch for row in rollout.rows]
    fresh = drop_stale(rows_all, trainer_version=version, staleness_max=config.staleness_max)
    short = drop_long(fresh.items, tokens_max=tokens_max)
    rows = drop_unscored(short.items)
    counts.update(fresh.dropped + short.dropped + rows.dropped)
    return rows.items, [advantage_of[row.rollout_id] for row in rows.items]


def _staleness(rows: Sequence[Row], version: int) -> dict[str, float]:
    """Versions between the oldest trained token of each row and the policy that is being improved."""
    behind = [version - row.version_oldest for row in rows]
    return {"staleness_mean": sum(behind) / len(behind), "staleness_max": max(behind)}


def _good_enough(rewards: Sequence[float], config: RlSection) -> bool:
    window = rewards[-config.stop_window :]
    if config.stop_reward is None:
        return False
    return len(window) == config.stop_window and sum(window) / len(window) >= config.stop_reward


def _loss(config: RlSection) -> Loss:
    return {"ppo_clip": losses.ppo_clip, "cispo": losses.cispo, "reinforce": losses.reinforce}[config.loss]()
