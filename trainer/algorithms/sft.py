"""Supervised start: a teacher's rollouts go through the bus like any others, and the policy imitates what was recorded.

    submit rollouts that call the teacher → wait → rows from their spans ─┐
                          conversations in files → rows (`data.chats`) ───┴→ epochs of cross-entropy → version 1

All recorded rollouts are imitated, the wrong ones too: a teacher's mistakes are its own, and reward comes later. The loss
of an update is the mean over its trained tokens. The order of the rows depends on the seed and the epoch alone, so an
interrupted epoch is run again as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import anyio.to_thread

from lightning_bus import ConfigError, CreditSection
from lightning_bus.adapters import Row, scored
from trainer.algorithms import lines
from trainer.config import check_schedule
from trainer.data.batch import pack_rows
from trainer.data.chats import chat_rows
from trainer.data.filters import drop_failed, drop_long, drop_unscored
from trainer.data.stream import TEACHER, RolloutStream, submission
from trainer.optimize import losses
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import StepMetrics, train_step
from trainer.policy.model import load_tokenizer
from trainer.ranks import num_ranks
from trainer.refusals import as_config_error, refuse_lengths, refuse_tokens
from trainer.serving.chat import ChatFormat
from trainer.serving.engine import end_ids
from trainer.session import Session, trained_record


async def imitate(
    session: Session, stream: RolloutStream, tasks: Sequence[Any], conversations: Sequence[Row] = ()
) -> None:
    """Train on the teacher's rollouts over `tasks`, and on conversations, and publish the result as the next version.

    conversations  `read_conversations`; rows that are longer than the token budget are left out and counted

    Raises ConfigError where nothing is left to imitate, or a token is not the model's.
    """
    config, progress = session.train.sft, session.progress
    recorded = await record_teacher(session, stream, tasks[: config.rollouts]) if config.rollouts else []
    every = [*recorded, *conversations]
    refuse_tokens(every, session.model)
    refuse_lengths([len(row.token_ids) for row in every], session.train.token_budget)
    rows, dropped = (kept := drop_long(every, tokens_max=session.train.token_budget)).items, kept.dropped
    optimizer = _optimizer(session, updates=config.epochs * math.ceil(len(rows) / config.batch_rollouts))
    if progress.phase != "sft":
        progress.phase, progress.step = "sft", 0
    session.restore_optimizer(optimizer)
    while progress.step < config.epochs:
        order = random.Random(f"sft {session.run.run.seed} {progress.step}").sample(rows, len(rows))
        steps: list[StepMetrics] = []
        for start in range(0, len(order), config.batch_rollouts):
            batch = order[start : start + config.batch_rollouts]
            packs = pack_rows(
                batch,
                [1.0] * len(batch),
                token_budget=session.train.token_budget,
                temperature=1.0,
                ranks=num_ranks(),
            )
            # On a thread: replicas that are being caught up, and the bus, must not wait for a step to end.
            steps.append(await anyio.to_thread.run_sync(train_step, session.model, optimizer, packs, losses.sft))
        progress.step += 1
        session.tell(session.note("sft", rows=len(rows), dropped=dict(dropped), **lines.step_line(steps[-1])))
        await anyio.to_thread.run_sync(session.checkpoint, optimizer)
        await session.retain()
    progress.parent, progress.version = progress.version, progress.version + 1
    progress.trained = trained_record([row for row in rows if row.span_ids])  # the rest is in no log
    progress.line = {}
    progress.stream = stream.saved_state()
    progress.phase, progress.step = "rl", 0
    await anyio.to_thread.run_sync(session.checkpoint, optimizer)
    await session.publish()
    await session.retain()


def _optimizer(session: Session, *, updates: int) -> Optimizer:
    """Return what [train.sft] asks for; updates: of all epochs, where the schedule ends unless the section says."""
    config = session.train.sft
    total_updates = config.schedule_updates or updates
    with as_config_error("train.sft"):
        check_schedule(config.schedule, config.warmup_updates, total_updates, "updates of all epochs")
        return Optimizer(
            session.model,
            lr=config.lr,
            kind=config.optimizer,
            betas=config.betas,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            warmup_updates=config.warmup_updates,
            schedule=config.schedule,
            total_updates=total_updates,
            grad_norm_max=config.grad_norm_max,
        )


def read_conversations(session: Session) -> list[Row]:
    """Return the rows of [train.sft] files. Raises ConfigError with file and line number for one that cannot be used."""
    if not session.train.sft.files:
        return []
    tokenizer = load_tokenizer(session.directory / "policy")
    return chat_rows(session.train.sft.files, ChatFormat(tokenizer, end_ids(session.model, tokenizer)))


async def record_teacher(session: Session, stream: RolloutStream, tasks: Sequence[Any]) -> list[Row]:
    """Have the workers carry out `tasks` with the teacher as the model, and return the rows of what was recorded."""
    teacher = session.train.sft.teacher
    submissions = [submission(f"teacher-{i:05d}", task, TEACHER, model=teacher) for i, task in enumerate(tasks)]
    ended = await stream.carry_out(submissions, session.directory)
    credit = session.run.section(CreditSection)  # whose calls: a fixed agent's are nothing to imitate
    rollouts, dropped = scored(ended, credit, policy=session.policy.name, any_model=True)
    kept = drop_failed(rollouts)
    rows = drop_unscored([row for rollout in kept.items for row in rollout.rows])
    reward_mean = sum(rollout.reward or 0.0 for rollout in kept.items) / max(1, len(kept.items))
    drops = {**dropped, **kept.dropped, **rows.dropped}
    session.tell(
        session.note(
            "teacher", step=0, reward_mean=reward_mean, rollouts=len(ended), rows=len(rows.items), dropped=drops
        )
    )
    if not rows.items:
        raise ConfigError(
            f"nothing to imitate: {len(ended)} rollouts called the teacher {teacher!r} and recorded no trainable call "
            f"(left out: {drops}). Look: lightning-bus spans {ended[0].rollout_id} --run {session.directory}"
        )
    return rows.items
