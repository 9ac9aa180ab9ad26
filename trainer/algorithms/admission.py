"""Which rollouts are on their way: as many as staleness allows, so that a step never starves, and no more.

    accepted + running ≤ (staleness_max + version + 1) · groups_per_step          (AReaL, arXiv 2505.24298)

counted in groups, and by what was consumed rather than by version: a group is consumed when it was trained on and the
new weights are out, or when it taught nothing. So a group that is submitted under version v has its turn by version
v + staleness_max, unless others that came later end before it; then it is dropped as stale. With staleness_max = 0 none
is on its way while weights change: every rollout is begun and ended by the version that it then improves.

Groups are numbered, and the number decides task and rollout ids; a resumed trainer submits the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_bus import CreditSection, Submission
from trainer.config import RlSection, answering_model
from trainer.data import curriculum
from trainer.data.stream import TRAIN, submission
from trainer.session import Session


async def keep_running_ahead(session: Session, tasks: Sequence[Any], groups_max: int | None = None) -> None:
    """Submit groups until as many are on their way as staleness allows: this step's, and staleness_max steps more.

    groups_max  submit no more than this
    """
    config, progress = session.train.rl, session.progress
    if session.train.follow:
        return
    ahead = progress.submitted_groups - progress.consumed_groups
    wanted = (config.staleness_max + 1) * config.groups_per_step - ahead
    await submit_groups(session, tasks, max(0, wanted if groups_max is None else min(wanted, groups_max)))


async def submit_groups(session: Session, tasks: Sequence[Any], count: int) -> None:
    """Submit the next `count` groups."""
    config, progress = session.train.rl, session.progress
    first = progress.submitted_groups
    # The teacher's tasks come last: on what the policy has imitated it no longer disagrees with itself, and a group
    # that agrees teaches nothing.
    unseen = session.train.sft.rollouts
    model = answering_model(session.policy, session.run.section(CreditSection))
    submissions: list[Submission] = []
    for group in range(first, first + count):
        task, labels = (unseen + group) % len(tasks), dict[str, str]()
        if config.curriculum:
            task = curriculum.choose(
                progress.curriculum, group, len(tasks), bounds=bounds(config), explore=config.explore
            )
            labels["task_number"] = str(task)  # its result is to be remembered under this number
        submissions += [
            submission(
                f"train-{group:05d}-{member}",
                tasks[task],
                TRAIN,
                group=f"train-{group:05d}",
                model=model,
                overrides={"temperature": config.temperature},
                **labels,
            )
            for member in range(config.group_size)
        ]
    if submissions:
        await session.bus.submit(submissions)
    progress.submitted_groups = first + count


async def cancel_unfinished(session: Session) -> None:
    """End the rollouts that ran ahead of the last step: nobody will train on them."""
    size = session.train.rl.group_size
    ids = [
        f"train-{group:05d}-{member}" for group in range(session.progress.submitted_groups) for member in range(size)
    ]
    for start in range(0, len(ids), 1000):
        await session.bus.cancel(ids[start : start + 1000])


def bounds(config: RlSection) -> tuple[float, float]:
    """Return between which success rates a task is worth trying."""
    return config.success_min, config.success_max
