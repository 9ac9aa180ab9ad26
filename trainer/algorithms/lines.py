"""What a step's line in metrics.jsonl says of its batch and of its updates. Names and meanings: docs/metrics.md."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any

from lightning_bus.adapters import FINAL, FinishedRollout, MergeStats, Row, ScoredRollout, SourceReport
from trainer.algorithms.admission import bounds
from trainer.data import curriculum
from trainer.optimize.step import StepMetrics
from trainer.session import Session


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


def successes(seen: Sequence[FinishedRollout], success_reward: float) -> dict[str, float]:
    """Return which share of the rollouts that have a reward reached success_reward, and what rewards spread over."""
    rewards = [one.reward for one in seen if one.reward is not None]
    if not rewards:
        return {}
    mean = sum(rewards) / len(rewards)
    spread = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return {
        "success_share": sum(reward >= success_reward for reward in rewards) / len(rewards),
        "reward_std": spread**0.5,
    }


def merging(batch: Sequence[ScoredRollout]) -> dict[str, float]:
    """Return what merging calls into rows saved in this batch."""
    merged = sum((one.transitions.merged for one in batch if one.transitions is not None), MergeStats())
    return {"rows_per_rollout": merged.rows_per_rollout, "tokens_saved": merged.tokens_saved}


def staleness(rows: Sequence[Row], version: int) -> dict[str, float]:
    """Return versions between the oldest trained token of each row and the policy that is being improved."""
    behind = [version - row.version_oldest for row in rows]
    return {"staleness_mean": sum(behind) / len(behind), "staleness_max": max(behind)}


def pools(session: Session, tasks: Sequence[Any]) -> dict[str, dict[str, int]]:
    """Return how many tasks are too hard, too easy, and worth trying; nothing without a curriculum."""
    config = session.train.rl
    if not config.curriculum:
        return {}
    return {"task_pools": curriculum.pool_sizes(session.progress.curriculum, len(tasks), bounds(config))}


def step_line(metrics: StepMetrics) -> dict[str, float]:
    """Return the part of a metrics line that every optimiser step has."""
    line = {
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "lr": metrics.lr,
        "skipped_updates": int(not metrics.applied),
        "trained_tokens": metrics.trained_tokens,
        "num_tokens": metrics.num_tokens,
        "num_packs": metrics.num_packs,
        "tokens_per_s": metrics.tokens_per_s,
        "forward_s": metrics.forward_s,
        "backward_s": metrics.backward_s,
        "update_s": metrics.update_s,
        "step_s": metrics.step_s,
        **metrics.means,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES,
    }
    if metrics.mfu is not None:
        line["mfu"] = metrics.mfu
    if metrics.peak_bytes is not None:
        line["gpu_peak_bytes"] = metrics.peak_bytes
    return line


def steps_line(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Return that part for the updates of one step: sums of what adds up, maxima, the last rate, means of the rest.

    A mean is over the updates that have the name: tokens of some staleness need not be in all of them. Shares of tokens
    count as 0 where they are missing.
    """
    if len(steps) == 1:
        return step_line(steps[0])
    each = [step_line(one) for one in steps]
    line: dict[str, float] = {}
    for name in dict.fromkeys(name for one in each for name in one):
        values = [one[name] for one in each if name in one]
        if name in _SUMS:
            line[name] = sum(values)
        elif name.endswith(("_max", "_peak_bytes")):
            line[name] = max(values)
        else:
            line[name] = sum(values) / (len(each) if name.startswith("share_") else len(values))
    line |= {"lr": steps[-1].lr, "tokens_per_s": line["num_tokens"] / line["step_s"], "updates": len(steps)}
    if "mfu" in line:
        line["mfu"] = sum(one["mfu"] * one["step_s"] for one in each) / line["step_s"]
    return line


_SUMS = {
    "skipped_updates", "trained_tokens", "num_tokens", "num_packs", "forward_s", "backward_s", "update_s", "step_s",
}  # fmt: skip
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # macOS says bytes, Linux KiB
