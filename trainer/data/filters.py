"""What leaves before it is trained on, and why: pure, order kept, every drop counted by its reason.

First whole rollouts, then rows:

    rollouts ─► drop_failed ─► drop_rolled_back ─► drop_untrained ─► drop_uninformative ─► advantages
                                                         └─► rows ─► drop_stale ─► drop_long ─► drop_impossible ─► drop_unscored

Rollouts leave before a batch is counted, so that the batch is refilled rather than shrunk and the loss is
never averaged over tokens that cannot teach. Rows leave after the advantages are known: a rollout whose row
is too long still says how hard its task was.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from lightning_bus.adapters import Row, ScoredRollout

Item = TypeVar("Item")


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
        if rollout.total is None:
            return "failed"
        return None if np.isfinite(rollout.total) else "nonfinite_reward"

    return _keep(rollouts, reason)


def drop_uninformative(rollouts: Sequence[ScoredRollout], *, by_turn: bool = False) -> Kept[ScoredRollout]:
    """Keep groups whose returns differ. Reasons, in rollouts: `singleton_group`, `zero_variance_group`.

    by_turn  also those whose returns are equal but whose turns earned unequally: credit by turn tells them apart

    Every advantage in such a group is 0, so it adds nothing to the gradient and would only dilute the
    denominator (dynamic sampling, arXiv 2503.14476).
    """
    returns_of: defaultdict[str, list[float | None]] = defaultdict(list)
    steps_of: defaultdict[str, set[float | None]] = defaultdict(set)
    for rollout in rollouts:
        returns_of[rollout.group].append(rollout.total)
        if by_turn and rollout.episode is not None:
            steps_of[rollout.group].update(rollout.episode.rewards_T.tolist())

    def reason(rollout: ScoredRollout) -> str | None:
        returns = returns_of[rollout.group]
        if len(returns) == 1:
            return "singleton_group"
        equal = len(set(returns)) == 1 and len(steps_of[rollout.group]) <= 1
        return "zero_variance_group" if equal else None

    return _keep(rollouts, reason)


def drop_untrained(rollouts: Sequence[ScoredRollout]) -> Kept[ScoredRollout]:
    """Keep groups of which at least one rollout has rows. Reason, in rollouts: `nothing_to_train`.

    Where one agent of several is trained, a task may be done without it.
    """
    with_rows = {rollout.group for rollout in rollouts if rollout.rows}
    return _keep(rollouts, lambda rollout: None if rollout.group in with_rows else "nothing_to_train")


def drop_rolled_back(rollouts: Sequence[ScoredRollout], *, first_version: int) -> Kept[ScoredRollout]:
    """Keep rollouts in which every sampled token comes from `first_version` or later. Reason: `rolled_back`.

    A rollback gives versions up. What they sampled is not the past of the policy that goes on, however near their
    numbers are.
    """
    return _keep(
        rollouts,
        lambda rollout: "rolled_back" if any(0 <= row.version_oldest < first_version for row in rollout.rows) else None,
    )


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


def drop_impossible(rows: Sequence[Row]) -> Kept[Row]:
    """Keep rows that a model can have sampled. Reasons: `token_id_out_of_range`, `greedy`.

    A negative id names no token. What was sampled at temperature 0 has no log-prob to correct by; supervised training,
    which asks for none, does without this filter.
    """

    def reason(row: Row) -> str | None:
        if row.token_ids.min(initial=0) < 0:
            return "token_id_out_of_range"
        return None if (row.temperatures[row.trained] > 0).all() else "greedy"

    return _keep(rows, reason)


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
