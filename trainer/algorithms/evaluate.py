"""Held-out success: the same agent, the same workers, tasks that were never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.stream import EVAL, RolloutStream, submission
from trainer.session import Session


async def evaluate(session: Session, stream: RolloutStream, tasks: Sequence[Any]) -> float:
    """Return the mean reward on the held-out tasks under the version that is served now.

    A rollout that failed counts as 0: an agent that cannot be carried out has not succeeded. A version is evaluated
    once; asked again, by a resumed run for instance, the recorded result is returned. Raises AgentError when every
    rollout failed: that says nothing about the policy.
    """
    version = str(session.progress.version)
    if version in session.progress.evals:
        return session.progress.evals[version]
    config = session.train.eval
    overrides = {"temperature": config.temperature}
    submissions = [
        submission(
            f"eval-v{version}-{i:04d}", task, EVAL, model=session.policy.name, overrides=overrides, version=version
        )
        for i, task in enumerate(tasks[: config.tasks])
    ]
    ended = await stream.carry_out(submissions, session.directory)
    success = sum(rollout.reward or 0.0 for rollout in ended) / len(ended)
    session.progress.evals[version] = success
    failed = sum(rollout.reward is None for rollout in ended)
    session.tell(session.note("eval", held_out_success=success, rollouts=len(ended), failed=failed))
    return success
