"""Asynchronous policy-gradient training: GRPO's group-relative advantages, on rollouts that never wait for a step.

    while not done:
        keep rollouts running ahead of the trainer, but not further than staleness allows
        groups      ← complete groups, in the log's order; those whose rewards are all equal are replaced
        advantages  ← return − mean return of the task's group            (or by turn, as [credit] says)
        rows        ← recorded token ids and log-probs, merged by prefix  (never re-tokenised)
        loss        ← clipped importance-weighted policy gradient, one denominator a step
        step, checkpoint, publish version + 1, push

Departs from GRPO (arXiv 2402.03300) where later work found better: no division by the group's spread and a mean over
all tokens of the step (Dr. GRPO, arXiv 2503.20783; DAPO, arXiv 2503.14476), no KL term, behaviour log-probs as the
engine recorded them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
import numpy as np

from lightning_bus import ConfigError, CreditSection, Status, Submission
from lightning_bus.adapters import (
    FINAL,
    FinishedRollout,
    MergeStats,
    RewardsSection,
    Row,
    ScoredRollout,
    Selection,
    SourceReport,
    call_advantages,
    scored,
)
from trainer.algorithms.evaluate import evaluate
from trainer.config import RlSection
from trainer.data import curriculum
from trainer.data.batch import pack_rows
from trainer.data.filters import (
    Kept,
    drop_failed,
    drop_impossible,
    drop_long,
    drop_rolled_back,
    drop_stale,
    drop_uninformative,
    drop_unscored,
    drop_untrained,
)
from trainer.data.stream import TRAIN, RolloutStream, submission
from trainer.optimize import losses
from trainer.optimize.losses import Loss
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.session import Session, step_line, trained_record

log = logging.getLogger(__name__)


async def reinforce(session: Session, stream: RolloutStream, tasks: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Train until `steps_max`, or until the reward of the last steps reaches `stop_reward`."""
    config, progress = session.train.rl, session.progress
    credit = session.run.section(CreditSection)
    Selection.of(credit.agents)  # what is no pattern is told now rather than when the first group is complete
    if credit.rule == "value":
        raise ConfigError(
            "credit.rule = 'value' needs a critic, and none is trained here. Choose identical, turn or leave_one_out; "
            "lightning_bus.adapters.call_advantages takes the values of a critic of your own."
        )
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
        rows = rows_and_advantages(batch, config, credit, progress.version, session.train.token_budget, counts)
        learnt: dict[str, float] = {}
        if rows:
            packs = pack_rows(rows, token_budget=session.train.token_budget, normalise=config.normalise)
            # On a thread: replicas that are being caught up, and the bus, must not wait for a step to end.
            metrics = await anyio.to_thread.run_sync(train_step, session.model, optimizer, packs, loss)
            learnt = step_line(metrics) | _staleness(rows, progress.version)
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
            "rl",
            reward_mean=reward_mean,
            rollouts=len(rollouts),
            rows=len(rows),
            dropped=dict(counts),
            **_pools(session, tasks),
            **merging(batch),
            **reward_shares(batch),
            **learnt,
        )
        await anyio.to_thread.run_sync(session.checkpoint, optimizer)
        if rows:
            await session.publish()
        await session.retain()
        session.tell(progress.line)
    progress.phase = "done"
    await anyio.to_thread.run_sync(session.checkpoint, optimizer)
    await session.retain()


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
    submissions: list[Submission] = []
    for group in range(first, first + count):
        task, labels = (unseen + group) % len(tasks), dict[str, str]()
        if config.curriculum:
            task = curriculum.choose(
                progress.curriculum, group, len(tasks), bounds=_bounds(config), explore=config.explore
            )
            labels["task_number"] = str(task)  # its result is to be remembered under this number
        submissions += [
            submission(
                f"train-{group:05d}-{member}",
                tasks[task],
                TRAIN,
                group=f"train-{group:05d}",
                model=session.policy.name,
                overrides={"temperature": config.temperature},
                **labels,
            )
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
    credit, rewards = session.run.section(CreditSection), session.run.section(RewardsSection)
    informative: list[ScoredRollout] = []
    seen: list[FinishedRollout] = []
    all_scored: list[ScoredRollout] = []
    counts: Counter[str] = Counter()
    groups_left = config.groups_per_step + config.refill_groups_max
    missing = config.groups_per_step
    while missing and groups_left:
        groups = await stream.next_groups(min(missing, groups_left))
        groups_left -= len(groups)
        for group in groups:
            rollouts, dropped = scored(group.rollouts, credit, rewards, policy=session.policy.name)
            counts += dropped
            all_scored += rollouts
            succeeded = drop_failed(rollouts)
            current = drop_rolled_back(succeeded.items, first_version=progress.rolled_back)
            kept = _informative(current.items, credit)
            counts += succeeded.dropped + current.dropped + kept.dropped
            task = group.rollouts[0].labels.get("task_number")
            if config.curriculum and task is not None:
                rewards_N = [one.reward for one in current.items if one.reward is not None]
                curriculum.update(progress.curriculum, task, rewards_N, success=config.success_reward)
            if current.dropped or all(one.status is Status.CANCELLED for one in group.rollouts):
                groups_left += 1  # of those there are only as many as ran ahead of a rollback, or of a run's end
            informative += kept.items
            seen += group.rollouts
            if kept.items:
                missing -= 1
            else:
                progress.consumed_groups += 1
        # Only what taught nothing is replaced now. What is trained on makes room after the new version is out: a rollout
        # begun before that would be a version older than the bound when its turn comes.
        await keep_running_ahead(session, tasks)
    _check_agents(session, credit, all_scored)
    return informative, seen, counts


def rows_and_advantages(
    batch: Sequence[ScoredRollout],
    config: RlSection,
    credit: CreditSection,
    version: int,
    tokens_max: int,
    counts: Counter[str],
) -> list[Row]:
    """Return the rows to train on, every token with the advantage of its call; what is dropped is added to `counts`.

    Advantages come first: a rollout whose rows are too long or too old still says how hard its task was.
    """
    try:
        advantages = call_advantages(
            [rollout.episode for rollout in batch if rollout.episode is not None],
            rule=credit.rule,
            relevance=credit.relevance,
            gamma=credit.gamma,
            lambda_=credit.lambda_,
            estimator=credit.estimator,
            scale=config.scale,
        )
    except ValueError as exc:
        raise ConfigError(f"[credit] does not go with these rewards: {exc}") from exc
    advantage_of: dict[str, dict[bytes, float]] = {}
    for rollout, advantages_T in zip(batch, advantages, strict=True):
        turns = rollout.transitions.turns if rollout.transitions is not None else []
        calls = zip(turns, advantages_T, strict=True)
        advantage_of[rollout.rollout_id] = {turn.span_id: float(advantage) for turn, advantage in calls}
    rows_all = [row for rollout in batch for row in rollout.rows]
    fresh = drop_stale(rows_all, trainer_version=version, staleness_max=config.staleness_max)
    short = drop_long(fresh.items, tokens_max=tokens_max)
    possible = drop_impossible(short.items)
    rows = drop_unscored(possible.items)
    counts.update(fresh.dropped + short.dropped + possible.dropped + rows.dropped)
    return [row.with_advantages(advantage_of[row.rollout_id]) for row in rows.items]


def reward_shares(batch: Sequence[ScoredRollout]) -> dict[str, dict[str, float]]:
    """Return where returns came from: source → mean share of a rollout's return. Nothing where all are final rewards."""
    report = SourceReport()
    for rollout in batch:
        by_source = {FINAL: rollout.reward or 0.0}
        for turn in rollout.transitions.turns if rollout.transitions is not None else ():
            for reward in turn.rewards:
                by_source[reward.source] = by_source.get(reward.source, 0.0) + reward.value
        report.add(rollout.total, by_source)
    shares = {source: share for source, (_, share) in report.by_source().items()}
    return {"reward_shares": shares} if shares.keys() - {FINAL} else {}


def merging(batch: Sequence[ScoredRollout]) -> dict[str, float]:
    """Return, for the log, what merging calls into rows saved in this batch."""
    merged = sum((one.transitions.merged for one in batch if one.transitions is not None), MergeStats())
    return {"rows_per_rollout": merged.rows_per_rollout, "tokens_saved": merged.tokens_saved}


def _informative(rollouts: Sequence[ScoredRollout], credit: CreditSection) -> Kept[ScoredRollout]:
    """Drop groups that teach nothing. Compared with the whole batch, a group that agrees does teach."""
    kept = drop_untrained(rollouts)
    if credit.estimator == "reinforce++" and credit.rule != "leave_one_out":
        return kept
    differing = drop_uninformative(kept.items, by_turn=credit.rule != "identical")
    return Kept(differing.items, kept.dropped + differing.dropped)


def _check_agents(session: Session, credit: CreditSection, seen: Sequence[ScoredRollout]) -> None:
    """Tell when no call of a batch was one of the agents to train. In the first it ends the run: a name is misspelt."""
    made = [rollout.transitions for rollout in seen if rollout.transitions is not None]
    try:
        Selection.of(credit.agents).check({caller for one in made for caller in one.callers})
    except ConfigError as exc:
        if session.progress.step == 0:
            raise
        log.warning("step %d: %s", session.progress.step, exc)


def _bounds(config: RlSection) -> tuple[float, float]:
    return config.success_min, config.success_max


def _pools(session: Session, tasks: Sequence[Any]) -> dict[str, dict[str, int]]:
    """Return, for the log, how many tasks are too hard, too easy, and worth trying."""
    if not session.train.rl.curriculum:
        return {}
    return {"task_pools": curriculum.pool_sizes(session.progress.curriculum, len(tasks), _bounds(session.train.rl))}


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
