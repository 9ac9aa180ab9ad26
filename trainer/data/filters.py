"""What leaves before it is trained on, and why: pure, order kept, every drop counted by its reason.

First whole rollouts, then rows:

    rollouts ─► drop_failed ─► drop_uninformative ─► advantages
                                                         └─► rows ─► drop_stale ─► drop_long ─► drop_unscored

Rollouts leave before a batch is counted, so that the batch is refilled rather than shrunk and the loss is
never averaged over tokens that cannot teach. Rows leave after the advantages are known: a rollout whose row
is too long still says how hard its task was.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from lightning_bus.adapters import Row

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A finished rollout and its rows. reward is None when it failed, which is not a reward of 0."""

    rollout_id: str
    group: str
    reward: float | None
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept(Generic[Item]):
    """What a filter let through, in its old order, and how many it did not, by reason."""

    items: list[Item]
    dropped: Counter[str] = field(default_factory=Counter)


def drop_failed(rollouts: Sequence[ScoredRollout]) -> Kept[ScoredRollout]:
    """Keep rollouts with a finite reward. Reasons: `failed` (no reward), `nonfinite_reward`.

    A crashed tool or a lost worker says nothing about the policy; counting it as 0 would teach the policy to
    avoid whatever it was doing when the machine broke.
    """

    def reason(rollout: ScoredRollout) -> str | None:
        if rollout.reward is None:
            return "failed"
        return None if np.isfinite(rollout.reward) else "nonfinite_reward"

    return _keep(rollouts, reason)


def drop_uninformative(rollouts: Sequence[ScoredRollout]) -> Kept[ScoredRollout]:
    """Keep groups whose rewards differ. Reasons, in rollouts: `singleton_group`, `zero_variance_group`.

    Every advantage in such a group is 0, so it adds nothing to the gradient and would only dilute the
    denominator (dynamic sampling, arXiv 2503.14476).
    """
    rewards_of: defaultdict[str, list[float | None]] = defaultdict(list)
    for rollout in rollouts:
        rewards_of[rollout.group].append(rollout.reward)

    def reason(rollout: ScoredRollout) -> str | None:
        rewards = rewards_of[rollout.group]
        if len(rewards) == 1:
            return "singleton_group"
        return "zero_variance_group" if len(set(rewards)) == 1 else None

    return _keep(rollouts, reason)


def drop_stale(rows: Sequence[Row], *, trainer_version: int, staleness_max: int) -> Kept[Row]:
    """Keep rows whose *oldest* trained token is at most staleness_max versions behind.

    Reasons: `stale`; `unnumbered_version` for a row that no numbered policy sampled (a scripted teacher's).
    """

    def reason(row: Row) -> str | None:
        if row.version_oldest < 0:
            return "unnumbered_version"
        return "stale" if trainer_version - row.version_oldest > staleness_max else None

    return _keep(rows, reason)


def drop_long(rows: Sequence[Row], *, tokens_max: int) -> Kept[Row]:
    """Keep rows of at most tokens_max tokens. Reason: `too_long`."""
    return _keep(rows, lambda row: "too_long" if len(row.token_ids) > tokens_max else None)


def drop_unscored(rows: Sequence[Row]) -> Kept[Row]:
    """Stop training tokens whose behaviour log-prob is not finite; drop rows that then train nothing.

    Reasons: `nonfinite_logprob_token` counts tokens, `untrained` counts rows. Engines do return -inf now and
    then; one such ratio would turn the whole step into NaN.
    """
    items: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        bad = row.trained & ~np.isfinite(row.logprobs)
        if bad.any():
            dropped["nonfinite_logprob_token"] += int(bad.sum())
            row = replace(row, trained=row.trained & ~bad, logprobs=np.where(bad, np.float32(0), row.logprobs))
        if row.trained.any():
            items.append(row)
        else:
            dropped["untrained"] += 1
    return Kept(items, dropped)


def _keep(items: Sequence[Item], reason: Callable[[Item], str | None]) -> Kept[Item]:
    reasons = [reason(item) for item in items]
    kept = [item for item, why in zip(items, reasons, strict=True) if why is None]
    return Kept(kept, Counter(why for why in reasons if why is not None))
