"""Asynchronous policy-gradient training, on rollouts that never wait for a step: one loop for all algorithms.

    while not done:
        keep rollouts running ahead of the trainer, but not further than staleness allows
        groups      ← complete groups, in the log's order; those that teach nothing are replaced
        advantages  ← Algorithm.advantages: what each rollout, call or token earned
        rows        ← recorded token ids and log-probs, merged by prefix       (never re-tokenised)
        learn       ← Algorithm.learn: a critic, where there is one
        step        ← Algorithm.loss, one denominator an update
        checkpoint, publish version + 1, push

What always holds: behaviour log-probs are those that the engine recorded; a version is checkpointed before anyone sees
it; what the loop waits for, and how long, stands in its line of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread

from lightning_bus import ConfigError
from lightning_bus.adapters import Row
from trainer.algorithms import lines
from trainer.algorithms.admission import keep_running_ahead
from trainer.algorithms.base import Algorithm, Setting
from trainer.algorithms.batches import Batch, next_batch, rows_and_advantages
from trainer.algorithms.evaluate import evaluate
from trainer.algorithms.other_policies import OtherPolicies
from trainer.algorithms.ppo import PPO
from trainer.config import RlSection
from trainer.data.batch import PackedBatch, pack_rows
from trainer.data.stream import RolloutStream
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.phases import Phases
from trainer.ranks import led, num_ranks
from trainer.refusals import refuse_tokens
from trainer.session import Session, trained_record


async def reinforce(
    session: Session,
    stream: RolloutStream,
    tasks: Sequence[Any],
    held_out: Sequence[Any],
    algorithm: Algorithm,
) -> None:
    """Train until `steps_max`, or until the reward of the last steps reaches `stop_reward`."""
    config, progress = session.train.rl, session.progress
    learner = await anyio.to_thread.run_sync(Learner, session, algorithm)
    while progress.step < config.steps_max and not _good_enough(progress.rewards, config):
        phases = Phases()
        with phases.timed("evaluate_s"):
            await _evaluate_if_due(session, stream, held_out)
        await keep_running_ahead(session, tasks)
        batch = await next_batch(session, stream, tasks, learner.algorithm, phases)
        # On a thread: replicas that are being caught up, and the bus, must not wait for a step to end.
        rows = await anyio.to_thread.run_sync(learner.rows, batch, phases)
        learnt = await anyio.to_thread.run_sync(learner.learn, rows, phases)
        if learnt.policy:
            # The log must show that agents met this version before it is replaced; new rollouts are on their way.
            with phases.timed("wait_version_s"):
                await stream.wait_version_called(progress.version)
            progress.parent, progress.version = progress.version, progress.version + 1
        progress.step += 1
        progress.consumed_groups += batch.num_groups
        progress.rewards.append(batch.reward_mean)
        progress.trained = trained_record(rows)
        progress.stream = stream.saved_state()
        progress.line = session.note(
            "rl",
            reward_mean=batch.reward_mean,
            rollouts=len(batch.seen),
            rows=len(rows),
            dropped=dict(batch.dropped),
            **lines.successes(batch.seen, config.success_reward),
            **lines.pools(session, tasks),
            **lines.merging(batch.rollouts),
            **lines.reward_shares(batch.rollouts),
            **learnt.metrics,
        )
        with phases.timed("checkpoint_s"):
            await anyio.to_thread.run_sync(session.checkpoint, learner.optimizer, learner.parts)
            await stream.commit(progress.stream)
        with phases.timed("publish_s"):
            if learnt.policy:
                await session.publish()
        await session.retain()
        session.tell(progress.line | phases.line())
    progress.phase = "done"
    await anyio.to_thread.run_sync(session.checkpoint, learner.optimizer, learner.parts)
    await session.retain()


class Learner:
    """What learns in this loop: the policy by its optimiser, and what the algorithm has beside it. Not async."""

    def __init__(self, session: Session, algorithm: Algorithm) -> None:
        """Take everything up where the checkpoint left it. Raises ConfigError for what cannot be trained like this."""
        config = session.train.rl
        self.algorithm = algorithm
        _refuse_ranks(session, self.algorithm)
        self.optimizer = Optimizer(
            session.model,
            lr=config.lr,
            kind=config.optimizer,
            betas=config.betas,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            warmup_updates=config.warmup_updates,
            schedule=config.schedule,
            total_updates=config.schedule_updates or self.algorithm.num_updates(config.steps_max),
            grad_norm_max=config.grad_norm_max,
        )
        self._session = session
        self.algorithm.prepare(
            Setting(session.model, session.directory / "policy", session.train, session.run.run.seed)
        )
        self.parts = self.algorithm.parts()
        self._others = OtherPolicies(session, self.algorithm)
        session.restore_optimizer(self.optimizer, self.parts)

    def rows(self, batch: Batch, phases: Phases) -> list[Row]:
        """Return the rows of this batch that are trained on, with what their tokens earned."""
        train, version = self._session.train, self._session.progress.version
        with phases.timed("advantages_s"):
            rows = rows_and_advantages(
                batch,
                self.algorithm,
                version=version,
                staleness_max=train.rl.staleness_max,
                tokens_max=train.token_budget,
            )
        refuse_tokens(rows, self._session.model)
        return rows

    def learn(self, rows: Sequence[Row], phases: Phases) -> Learnt:
        """Learn from the rows: first what the algorithm has beside the policy, then the policy."""
        if not rows:
            return Learnt(policy=False)
        policy_waits, version = self.algorithm.policy_waits, self._session.progress.version
        with phases.timed("learn_s"):
            metrics = dict(self.algorithm.learn(rows)) | lines.staleness(rows, version)
        if policy_waits:
            return Learnt(policy=False, metrics=metrics)
        with phases.timed("score_s"):
            scored = self._others.score(rows)
        steps = [
            train_step(self._session.model, self.optimizer, scored.beside(self._packs(some), some), self.algorithm.loss)
            for some in self.algorithm.updates(rows)
        ]
        return Learnt(policy=True, metrics=lines.steps_line(steps) | metrics)

    def _packs(self, rows: Sequence[Row]) -> list[PackedBatch]:
        return pack_rows(
            rows,
            token_budget=self._session.train.token_budget,
            normalise=self.algorithm.normalise,
            fixed_length=self.algorithm.fixed_length,
            version=self._session.progress.version,
            ranks=num_ranks(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What came of a step. policy: it made a new version of the policy."""

    policy: bool
    metrics: dict[str, float] = field(default_factory=dict[str, float])


def _refuse_ranks(session: Session, algorithm: Algorithm) -> None:
    """Raise ConfigError where several ranks train and the algorithm has something that only the leader knows of."""
    if led(session.model) is not None and type(algorithm).prepare not in (Algorithm.prepare, PPO.prepare):
        raise ConfigError(
            f"{num_ranks()} processes train, and {type(algorithm).__name__} prepares something of its own beside the "
            "policy, which the others would not know of: train it in one process"
        )


async def _evaluate_if_due(session: Session, stream: RolloutStream, held_out: Sequence[Any]) -> None:
    """Before the next step rather than after the last: a trainer that was killed in between still owes it."""
    every, step = session.train.eval.every_steps, session.progress.step
    if every and step and step % every == 0 and not session.train.follow:
        await evaluate(session, stream, held_out)


def _good_enough(rewards: Sequence[float], config: RlSection) -> bool:
    window = rewards[-config.stop_window :]
    if config.stop_reward is None:
        return False
    return len(window) == config.stop_window and sum(window) / len(window) >= config.stop_reward
