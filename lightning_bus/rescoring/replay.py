"""A recorded run scored again: log in; transitions, scores and what changed out. No agent, engine or broker runs.

    NEW/transitions.jsonl   a row for each model call of the agents that are trained: state, action, reward, advantage
    NEW/rollouts.jsonl      a row for each rollout: rewards before and now, and where they came from
    NEW/replay.json         what was asked for, what was counted and what changed

NEW is a directory of tables and not another log: a log is the history that a broker wrote, and the rollouts happened
once, while scorings of them are derived, may be many, can be thrown away and made again, and are read by other tools.
It appears whole or not at all, and the log is only read.

Groups go through one batch at a time, so memory does not grow with the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import numpy as np

from lightning_bus.adapters import (
    Episode,
    FinishedRollout,
    MergeStats,
    RewardsSection,
    RolloutRewards,
    Selection,
    Transitions,
    call_advantages,
    rewards_of,
    transitions_of,
)
from lightning_bus.adapters.differences import Compared, Differences, Scoring
from lightning_bus.config import CreditSection
from lightning_bus.errors import ConfigError
from lightning_bus.lifecycle import Status
from lightning_bus.log.backup import appearing
from lightning_bus.log.reader import LogReader
from lightning_bus.log.tables import Format, Table, check_format, open_table
from lightning_bus.rescoring.hooks import HookPool, reward_hooks
from lightning_bus.rescoring.runs import Progress, finished_groups
from lightning_bus.rescoring.verdicts import Verdicts, read_verdicts

ROLLOUTS_AT_A_TIME = 256  # that a hook is asked about, so that its processes are kept busy

TRANSITION_COLUMNS = {
    "rollout_id": "string",
    "attempt": "int64",
    "group": "string",
    "agent": "string",
    "policy": "string",
    "turn": "int64",  # from 0, among the calls of the agents that are trained
    "span_id": "string",
    "state": "list int64",  # the prompt's token ids
    "action": "list int64",  # the sampled ones
    "next_state": "list int64",  # the prompt that continues this call; null where none does
    "logprobs": "list float32",  # of the action
    "temperature": "float64",
    "weight_versions": "json",  # [[version, start, end], …] over the action
    "reward": "float64",  # the call's own
    "rewards": "json",  # what that is made of: [{source, value, span_id}, …]
    "rollout_return": "float64",  # of the whole rollout; null where it has none
    "advantage": "float64",  # of each token of the action; null where the rollout has no return
    "left_out": "string",  # why it is not trained; empty when it is
}
ROLLOUT_COLUMNS = {
    "rollout_id": "string",
    "attempt": "int64",
    "group": "string",
    "labels": "json",
    "status": "string",
    "reward_recorded": "float64",
    "return_before": "float64",
    "reward": "float64",  # the final one
    "return": "float64",  # with what the calls earned; null where it was dropped
    "sources": "json",  # source → value; they sum to the return
    "shares": "json",  # source → value over the sum of all values' sizes
    "turns": "int64",
    "dropped": "string",  # why the rollout has no return; empty when it has one
    "detail": "string",
}


@dataclass(frozen=True, slots=True)
class Scored:
    """One rollout under the new scoring, and what it was before."""

    rollout: FinishedRollout
    transitions: Transitions
    before: Scoring
    rewards: RolloutRewards
    dropped: str = ""
    detail: str = ""
    advantages_T: Sequence[float] | None = None

    @property
    def after(self) -> Scoring:
        return Scoring(None, {}) if self.dropped else Scoring(self.rewards.total, self.rewards.by_source())


@dataclass(slots=True)
class Replayed:
    """What a replay did."""

    differences: Differences = field(default_factory=Differences)
    dropped: Counter[str] = field(default_factory=Counter[str])  # rollouts without a return, by reason
    left_out: Counter[str] = field(default_factory=Counter[str])  # model calls that are not trained
    unplaced: Counter[str] = field(default_factory=Counter[str])  # rewards that belong to no call
    merged: MergeStats = field(default_factory=MergeStats)
    transitions: int = 0
    recalled: int = 0  # rollouts whose verdict the log had, so that the hook was not asked

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "rollouts": self.differences.rollouts, "transitions": self.transitions,
            "recalled": self.recalled,
            "rows_per_rollout": self.merged.rows_per_rollout, "merge_ratio": self.merged.merge_ratio,
            "dropped": dict(self.dropped), "left_out": dict(self.left_out), "unplaced": dict(self.unplaced),
            "differences": self.differences.facts(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rescoring:
    """How to score. The hook and its limits are those of `rewards`.

    before     what the new scoring is compared with: the [rewards] that the run had, with what its hook said then
    against    instead: the returns of an earlier replay, by rollout
    ask_again  ask the hook about every rollout, also where the log has the verdict of the same code
    """

    rewards: RewardsSection = field(default_factory=RewardsSection)
    credit: CreditSection = field(default_factory=CreditSection)
    before: RewardsSection = field(default_factory=RewardsSection)
    against: Mapping[str, Scoring] | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    ask_again: bool = False

    def __post_init__(self) -> None:
        if self.credit.rule == "value":
            raise ConfigError(
                "credit 'value' needs a critic, which a log has not. Choose identical, turn, leave_one_out."
            )
        if self.credit.estimator.startswith("reinforce++"):
            raise ConfigError(
                f"{self.credit.estimator} compares the rollouts of a training batch, and a log does not say which those "
                "were. Choose an estimator of groups: grpo, dr_grpo, rloo, maxrl."
            )


async def replay(
    reader: LogReader, how: Rescoring, out: Path | None = None, form: Format = "jsonl", *,
    progress: Progress | None = None,
) -> Replayed:  # fmt: skip
    """Score every finished rollout of a log again, write it to a new directory, and return what changed.

    out  None: write nothing, only compare

    Raises CallError when `out` is not empty, ConfigError when the hook cannot be loaded.
    """
    if out is None:
        return await _replay(reader, how, None, None, progress)
    check_format(form)
    with appearing(out) as draft:
        with ExitStack() as stack:
            transitions = stack.enter_context(open_table(draft, "transitions", form, TRANSITION_COLUMNS))
            rollouts = stack.enter_context(open_table(draft, "rollouts", form, ROLLOUT_COLUMNS))
            replayed = await _replay(reader, how, transitions, rollouts, progress)
        told = {"asked": msgspec.to_builtins({"rewards": how.rewards, "credit": how.credit}), **replayed.facts()}
        (draft / "replay.json").write_bytes(msgspec.json.format(msgspec.json.encode(told)) + b"\n")
    return replayed


def read_scores(directory: Path) -> dict[str, Scoring]:
    """Return the returns that an earlier replay gave, by rollout id. Raises ConfigError where there are none."""
    try:
        with (directory / "rollouts.jsonl").open("rb") as file:
            rows = (msgspec.json.decode(line) for line in file)
            return {row["rollout_id"]: Scoring(row["return"], row["sources"]) for row in rows}
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{directory} holds no scores ({exc}). Give the --out of a replay that was written as jsonl."
        ) from exc


async def _replay(
    reader: LogReader, how: Rescoring, transitions: Table | None, rollouts: Table | None, progress: Progress | None
) -> Replayed:
    replayed = Replayed()
    selection = Selection.of(how.credit.agents)
    groups = finished_groups(reader, labels=how.labels, progress=progress)
    async with reward_hooks(how.rewards) as hooks:
        known, before = await anyio.to_thread.run_sync(_recorded_verdicts, reader, how, hooks)
        for batch in _batches(groups):
            flat = [rollout for group in batch for rollout in group]
            after = iter(flat if hooks is None else await hooks.judge(flat, known=known))
            replayed.recalled += sum(known.of(one) is not None for one in flat) if known is not None else 0
            for group in batch:
                scored = [
                    _score(rollout if before is None else before.apply(rollout), next(after), how, selection)
                    for rollout in group
                ]
                scored = _with_advantages(scored, how.credit)
                for one in scored:
                    _count(one, replayed)
                    if rollouts is not None:
                        rollouts.add(_rollout_row(one))
                    if transitions is not None:
                        for row in _transition_rows(one):
                            transitions.add(row, 16 * len(row["state"]) + 24 * len(row["action"]))
                compared = [
                    Compared(one.rollout.rollout_id, one.rollout.group, one.before, one.after) for one in scored
                ]
                replayed.differences.add_group(group[0].group or group[0].rollout_id, compared)
    return replayed


def _recorded_verdicts(
    reader: LogReader, how: Rescoring, hooks: HookPool | None
) -> tuple[Verdicts | None, Verdicts | None]:
    """Return the verdicts that need not be asked for again, and those that the run was trained by."""
    known = None if hooks is None or how.ask_again else Verdicts(hooks.hook, code=hooks.code)
    before = Verdicts(how.before.hook) if how.before.hook and how.against is None else None
    wanted = [one for one in (known, before) if one is not None]
    if wanted:
        read_verdicts(reader.records(), *wanted)
    return known, before


def _batches(groups: Iterable[list[FinishedRollout]]) -> Iterator[list[list[FinishedRollout]]]:
    batch: list[list[FinishedRollout]] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= ROLLOUTS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


# -- scoring --------------------------------------------------------------------------------------------------------------


def _score(recorded: FinishedRollout, rollout: FinishedRollout, how: Rescoring, selection: Selection) -> Scored:
    rewards = rewards_of(rollout, how.rewards)
    dropped = rollout.not_judged
    if rollout.status is not Status.SUCCEEDED:
        dropped = f"rollout {rollout.status.value}"
    elif rewards.total is None and not dropped:
        dropped = "no reward"
    detail = (rollout.error.strip().splitlines() or [""])[-1][:500] if dropped else ""
    made = transitions_of(
        rollout.rollout_id, rollout.attempt, rollout.group, rollout.spans, rewards=rewards.of_calls,
        selection=selection, truncated=how.credit.truncated,
    )  # fmt: skip
    if how.against is not None:
        before = how.against.get(rollout.rollout_id, Scoring(None, {}))
    else:
        earlier = rewards_of(recorded, how.before)
        before = Scoring(earlier.total, earlier.by_source() if earlier.total is not None else {})
    return Scored(recorded, made, before, rewards, dropped, detail)


def _with_advantages(group: Sequence[Scored], credit: CreditSection) -> list[Scored]:
    """Compare the rollouts of a group that have a return; those that have none take no part."""
    known = [one for one in group if not one.dropped]
    found = call_advantages(
        [_episode(one) for one in known], rule=credit.rule, relevance=credit.relevance, gamma=credit.gamma,
        estimator=credit.estimator,
    )  # fmt: skip
    of_rollout = {one.rollout.rollout_id: each for one, each in zip(known, found, strict=True)}
    return [
        one
        if one.dropped
        else Scored(
            one.rollout,
            one.transitions,
            one.before,
            one.rewards,
            advantages_T=of_rollout[one.rollout.rollout_id].tolist(),
        )
        for one in group
    ]


def _episode(one: Scored) -> Episode:
    assert one.rewards.final is not None
    return Episode.of(one.transitions, one.rewards.final)


def _count(one: Scored, replayed: Replayed) -> None:
    if one.dropped:
        replayed.dropped[one.dropped] += 1
    replayed.left_out += one.transitions.dropped
    replayed.unplaced += one.rewards.unplaced
    replayed.merged += one.transitions.merged
    replayed.transitions += len(one.transitions.turns)


# -- rows -----------------------------------------------------------------------------------------------------------------


def _rollout_row(one: Scored) -> dict[str, Any]:
    rollout, after = one.rollout, one.after
    return {
        "rollout_id": rollout.rollout_id,
        "attempt": rollout.attempt,
        "group": rollout.group,
        "labels": rollout.labels,
        "status": rollout.status.value,
        "reward_recorded": rollout.reward,
        "return_before": one.before.total,
        "reward": None if one.dropped else one.rewards.final,
        "return": after.total,
        "sources": after.by_source,
        "shares": {} if one.dropped else one.rewards.shares(),
        "turns": len(one.transitions.turns),
        "dropped": one.dropped,
        "detail": one.detail,
    }


def _transition_rows(one: Scored) -> Iterator[dict[str, Any]]:
    rollout, total = one.rollout, one.after.total
    for at, turn in enumerate(one.transitions.turns):
        call = turn.call
        yield {
            "rollout_id": rollout.rollout_id,
            "attempt": rollout.attempt,
            "group": rollout.group,
            "agent": turn.agent,
            "policy": turn.policy,
            "turn": at,
            "span_id": turn.span_id.hex(),
            "state": call.prompt_ids_P.view(np.uint32),
            "action": call.response_ids_R.view(np.uint32),
            "next_state": None if turn.next_state_P is None else turn.next_state_P.view(np.uint32),
            "logprobs": call.logprobs_R,
            "temperature": call.temperature,
            "weight_versions": call.weight_versions,
            "reward": float(turn.reward),
            "rewards": [
                {"source": reward.source, "value": reward.value, "span_id": reward.span_id.hex()}
                for reward in turn.rewards
            ],
            "rollout_return": total,
            "advantage": None if one.advantages_T is None else one.advantages_T[at],
            "left_out": turn.left_out,
        }
