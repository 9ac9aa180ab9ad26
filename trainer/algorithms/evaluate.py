"""Held-out success: the same agent, the same workers, tasks that were never trained on.

[train.eval] says how many tasks, how often, at which temperature (0 is greedy) and how many samples of each. What always
holds: a version is evaluated once, and the same version, tasks and samples are the same rollouts, so an evaluation that
was interrupted goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_bus import CreditSection
from trainer.config import answering_model
from trainer.data.stream import EVAL, RolloutStream, submission
from trainer.session import Session


async def evaluate(session: Session, stream: RolloutStream, tasks: Sequence[Any]) -> float:
    """Return the mean reward on the held-out tasks under the version that is served now.

    A rollout that failed counts as 0: an agent that cannot be carried out has not succeeded. A version is evaluated
    once; asked again, by a resumed run for instance, the recorded result is returned. With several samples of a task
    the line in metrics.jsonl also says pass@k. Raises AgentError when every rollout failed: that says nothing about the
    policy.
    """
    version = str(session.progress.version)
    if version in session.progress.evals:
        return session.progress.evals[version]
    config = session.train.eval
    model = answering_model(session.policy, session.run.section(CreditSection))
    overrides = {"temperature": config.temperature}
    tried = tasks[: config.tasks]
    submissions = [
        submission(
            f"eval-v{version}-{i:04d}" + (f"-{sample}" if config.samples > 1 else ""),
            task,
            EVAL,
            group=f"eval-v{version}-{i:04d}",
            model=model,
            overrides=overrides,
            version=version,
        )
        for i, task in enumerate(tried)
        for sample in range(config.samples)
    ]
    ended = await stream.carry_out(submissions, session.directory)
    rewards = [0.0 if rollout.reward is None else rollout.reward for rollout in ended]
    success = sum(rewards) / len(rewards)
    session.progress.evals[version] = success
    failed = sum(rollout.reward is None for rollout in ended)
    by_task = [rewards[at : at + config.samples] for at in range(0, len(rewards), config.samples)]
    passed = pass_rates(by_task, session.train.rl.success_reward) if config.samples > 1 else {}
    session.tell(session.note("eval", held_out_success=success, rollouts=len(ended), failed=failed, **passed))
    return success


def pass_rates(rewards: Sequence[Sequence[float]], success_reward: float) -> dict[str, float]:
    """Return pass_at_K for K = 1, 2, 4, … and the number of samples: the mean of `pass_at` over tasks.

    rewards  of each task's samples, as many of every task
    """
    samples = len(rewards[0])
    passes = [sum(reward >= success_reward for reward in of_task) for of_task in rewards]
    tries = sorted({samples, *(1 << power for power in range(samples.bit_length()))})
    return {f"pass_at_{k}": sum(pass_at(samples, c, k) for c in passes) / len(passes) for k in tries}


def pass_at(n: int, c: int, k: int) -> float:
    """Return the chance that at least one of k samples passes, where c of n did: 1 − C(n−c, k) / C(n, k).

    Without a bias, unlike 1 − (1 − c/n)^k (Chen et al., arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
