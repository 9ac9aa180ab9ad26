"""A log → scored groups of transitions, as they become complete: what a trainer of any kind learns from.

    stream = TransitionStream(cursor=saved, group_size=8, labels={"phase": "train"}, credit=run.section(CreditSection))
    async for group in stream.follow(bus):                # or: for group in stream.read(reader)
        learn(group.rollouts)
        saved = stream.cursor

The same log gives the same groups in the same order, with the same numbers, whenever it is read; with a cursor a
reader that was stopped goes on with the group that it would have been handed next. Reading takes nothing from the log
and holds nobody up. This file does no I/O: it is handed the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from lightning_bus.adapters.credit import Episode
from lightning_bus.adapters.groups import Cursor, Group, Groups
from lightning_bus.adapters.rollouts import FinishedRollout
from lightning_bus.adapters.rows import Row
from lightning_bus.adapters.scoring import RewardsSection, rewards_of
from lightning_bus.adapters.selection import Selection
from lightning_bus.adapters.transitions import Transitions, transitions_of
from lightning_bus.config import CreditSection
from lightning_bus.records import Record

Judge = Callable[[Sequence[FinishedRollout]], Awaitable[Sequence[FinishedRollout]]]


class ScoredRollout(msgspec.Struct, frozen=True, eq=False):
    """A finished rollout and what it holds to learn from. reward is None when it failed, which is not a reward of 0.

    reward       of the rollout itself
    transitions  its model calls
    episode      what its turns earned; None: there is nothing beside the reward
    """

    rollout_id: str
    group: str
    reward: float | None
    transitions: Transitions | None = None
    episode: Episode | None = None

    @property
    def rows(self) -> Sequence[Row]:
        """The training rows, made when they are first asked for."""
        return () if self.transitions is None else self.transitions.rows

    @property
    def total(self) -> float | None:
        """The return: its reward and those of its turns."""
        return self.reward if self.episode is None else self.episode.total


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A complete group, scored.

    finished  its rollouts as the log has them
    rollouts  the same, with their transitions and what they earned
    dropped   why model calls and rewards were left out
    """

    name: str
    finished: tuple[FinishedRollout, ...]
    rollouts: list[ScoredRollout]
    dropped: Counter[str] = field(default_factory=Counter[str])


class Log(Protocol):
    """A log on this machine: LogReader."""

    def records(self, offset: int | None = None) -> Iterator[Record]: ...


class Bus(Protocol):
    """A broker that is asked: Client."""

    def follow(self, offset: int = 0) -> AsyncGenerator[Record]: ...


class TransitionStream:
    """Complete groups of a log, scored. One reader at a time; `cursor` says what it was handed."""

    def __init__(
        self,
        *,
        group_size: int,
        cursor: Cursor | None = None,
        labels: Mapping[str, str] | None = None,
        credit: CreditSection | None = None,
        rewards: RewardsSection | None = None,
        policy: str | None = None,
    ) -> None:
        """cursor  where an earlier stream was; None: the oldest record
        labels  rollouts that do not carry these take no part
        policy  train this one, where [credit] names several

        group_size, credit and rewards must be the earlier stream's for the same groups to come.
        """
        self.groups = Groups(size=group_size, cursor=cursor, labels=labels)
        self._from_oldest = cursor is None  # which need not be record 0: retention drops what is old
        self._credit, self._rewards, self._policy = credit, rewards, policy

    @property
    def cursor(self) -> Cursor:
        """Where a successor has to go on to be handed the group after the last one that was handed out here."""
        return self.groups.cursor

    def read(self, log: Log) -> Iterator[ScoredGroup]:
        """Yield the groups that are complete at the log's end. Called again it goes on, with what was written meanwhile."""
        yield from self._taken()
        offset = self.groups.next_offset
        for record in log.records(None if self._from_oldest and not offset else offset):
            if self.groups.feed(record) is not None:
                yield from self._taken()

    async def follow(self, bus: Bus, judge: Judge | None = None) -> AsyncGenerator[ScoredGroup]:
        """Yield groups as they become complete, for ever.

        judge  says what rollouts earned, where a run has a reward hook: `HookPool.judge`
        """
        async with aclosing(bus.follow(self.groups.next_offset)) as records:
            while True:
                while (group := self.groups.peek()) is not None:
                    made = await self._judged(group, judge)
                    self.groups.take()  # not before: a judge that fails has not lost the group
                    yield made
                record = await anext(records, None)
                if record is None:
                    return
                self.groups.feed(record)

    def _taken(self) -> Iterator[ScoredGroup]:
        while (group := self.groups.take()) is not None:
            yield self._scored(group)

    async def _judged(self, group: Group, judge: Judge | None) -> ScoredGroup:
        return self._scored(group if judge is None else Group(group.name, tuple(await judge(group.rollouts))))

    def _scored(self, group: Group) -> ScoredGroup:
        rollouts, dropped = scored(group.rollouts, self._credit, self._rewards, policy=self._policy)
        return ScoredGroup(group.name, group.rollouts, rollouts, dropped)


def scored(
    rollouts: Sequence[FinishedRollout],
    credit: CreditSection | None = None,
    rewards: RewardsSection | None = None,
    *,
    policy: str | None = None,
    any_model: bool = False,
) -> tuple[list[ScoredRollout], Counter[str]]:
    """Return rollouts with their transitions and what they earned, and why model calls and rewards were left out.

    policy     train this one, where [credit] names several
    any_model  also by what other models answered: to imitate them
    """
    credit, rewards = credit or CreditSection(), rewards or RewardsSection()
    selection = Selection.of(credit.agents)
    result: list[ScoredRollout] = []
    dropped: Counter[str] = Counter()
    for rollout in rollouts:
        earned = rewards_of(rollout, rewards)
        made = transitions_of(
            rollout.rollout_id,
            rollout.attempt,
            rollout.group,
            rollout.spans,
            rewards=earned.of_calls,
            selection=selection,
            policy=policy,
            truncated=credit.truncated,
            any_model=any_model,
        )
        for counted in (made.dropped, earned.unplaced):
            if counted:
                dropped.update(counted)
        if rollout.not_judged:
            dropped[rollout.not_judged] += 1
        episode = None if earned.final is None else Episode.of(made, earned.final)
        result.append(ScoredRollout(rollout.rollout_id, rollout.group, earned.final, made, episode))
    return result, dropped
