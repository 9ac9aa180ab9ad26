"""The trainer's view of the bus: submit rollouts, and get them back finished, in the log's order.

One background task follows the log and hands each finished rollout to whoever waits for its kind ("train",
"eval", "teacher": the label `phase`). What it hands out depends on the log alone, so a trainer that resumes from an
offset sees the same rollouts in the same order, and takes the same next batch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import msgspec

from lightning_bus import AgentError, BrokenError, Client, Status, Submission, is_model_call, model_call
from lightning_bus.adapters import Assembler, FinishedRollout, transitions_of
from trainer.data.filters import ScoredRollout

TRAIN, EVAL, TEACHER = "train", "eval", "teacher"


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one task, ended."""

    name: str
    rollouts: tuple[FinishedRollout, ...]


@dataclass(slots=True)
class RolloutStream:
    """Follows the log from `offset`. `run` must be running in a task of its own."""

    bus: Client
    group_size: int
    offset: int
    limit_s: float
    # Training rollouts beyond `offset` that were consumed before it was saved: id → first offset.
    consumed: dict[str, int] = field(default_factory=dict[str, int])
    _assembler: Assembler = field(default_factory=Assembler)
    _groups: OrderedDict[str, list[FinishedRollout]] = field(default_factory=OrderedDict[str, list[FinishedRollout]])
    _complete: deque[Group] = field(default_factory=deque[Group])
    _ended: dict[str, FinishedRollout] = field(default_factory=dict[str, FinishedRollout])
    _version_seen: int = -1
    _progress: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self._assembler.next_offset = self.offset

    async def run(self) -> None:
        """Follow the log for ever."""
        async for record in self.bus.follow(self.offset):
            finished = self._assembler.feed(record)
            if finished is not None:
                self._take(finished)

    async def next_groups(self, count: int) -> list[Group]:
        """Return the next `count` complete groups of training rollouts, in the order in which they became complete."""
        await self._wait_for(lambda: len(self._complete) >= count, f"{count} complete groups of rollouts")
        groups = [self._complete.popleft() for _ in range(count)]
        self.consumed.update(
            (rollout.rollout_id, rollout.first_offset) for group in groups for rollout in group.rollouts
        )
        return groups

    async def wait_ended(self, rollout_ids: Collection[str]) -> list[FinishedRollout]:
        """Return these rollouts once all have ended, in the order given."""
        waiting = set(rollout_ids)

        def all_ended() -> bool:
            waiting.difference_update(self._ended)
            return not waiting

        await self._wait_for(
            all_ended, f"{len(waiting)} rollouts, {rollout_ids and next(iter(rollout_ids))} among them,"
        )
        return [self._ended.pop(rollout_id) for rollout_id in rollout_ids]

    async def carry_out(self, submissions: Sequence[Submission], run_dir: Path) -> list[FinishedRollout]:
        """Submit rollouts and return them, ended, in the order given.

        Raises AgentError when all of them failed: then it is not the policy that is at fault, and training on would be
        in vain. Where all failed in an earlier life of this run they are submitted anew, under other ids, because what
        they failed of may have been mended since.
        """
        again = 0
        while True:
            suffix = f"-again{again}" if again else ""
            named = [msgspec.structs.replace(one, rollout_id=one.rollout_id + suffix) for one in submissions]
            submitted = await self.bus.submit(named)
            ended = await self.wait_ended([one.rollout_id for one in named])
            if any(rollout.status is Status.SUCCEEDED for rollout in ended):
                return ended
            if submitted.fresh:
                first = ended[0]
                reason = (first.error.strip().splitlines() or [first.status.value])[-1]
                raise AgentError(
                    f"all {len(ended)} rollouts of phase {first.labels.get('phase')} failed; {first.rollout_id} after "
                    f"{first.attempt} attempts with: {reason}\n"
                    f"Its record: lightning-bus spans {first.rollout_id} --run {run_dir}"
                )
            again += 1

    async def wait_version_called(self, version: int) -> None:
        """Return once a finished rollout holds a call that this weight version, or a later one, answered."""
        await self._wait_for(
            lambda: self._version_seen >= version, f"a model call answered by weight version {version}"
        )

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint must keep: where to read on from, and what lies beyond it but was consumed already."""
        pending = [rollout for rollouts in self._groups.values() for rollout in rollouts]
        pending += [rollout for group in self._complete for rollout in group.rollouts]
        low = min([self._assembler.low_offset, *(rollout.first_offset for rollout in pending)])
        self.consumed = {rollout_id: first for rollout_id, first in self.consumed.items() if first >= low}
        return {"offset": low, "consumed": self.consumed}

    def _take(self, finished: FinishedRollout) -> None:
        self._version_seen = max(self._version_seen, _version_of(finished))
        if finished.labels.get("phase") != TRAIN:
            self._ended[finished.rollout_id] = finished
        elif finished.rollout_id not in self.consumed:
            members = self._groups.setdefault(finished.group, [])
            members.append(finished)
            if len(members) == self.group_size:
                # Sorted, so that what is trained on does not depend on which rollout happened to end first.
                members.sort(key=lambda rollout: rollout.rollout_id)
                self._complete.append(Group(finished.group, tuple(self._groups.pop(finished.group))))
        self._progress.set()
        self._progress = anyio.Event()

    async def _wait_for(self, condition: Any, what: str) -> None:
        """Wait while rollouts keep ending; give up when none has ended for limit_s."""
        while not condition():
            with anyio.move_on_after(self.limit_s) as scope:
                await self._progress.wait()
            if scope.cancelled_caught:
                status = await self.bus.status()
                raise BrokenError(
                    f"waited {self.limit_s:g} s for {what} and no rollout ended: {status.workers} workers with {status.slots} "
                    f"slots are connected, rollouts stand at {status.rollouts}. Start workers, or raise [train] rollout_limit_s."
                )


def submission(
    rollout_id: str,
    task: Any,
    phase: str,
    *,
    group: str = "",
    model: str = "",
    overrides: dict[str, Any] | None = None,
    **labels: str,
) -> Submission:
    """Return a rollout to submit. The same arguments give the same bytes, so it can be submitted again."""
    return Submission(
        rollout_id=rollout_id,
        task=msgspec.msgpack.encode(task),
        group=group or rollout_id,
        model=model,
        overrides=overrides or {},
        labels={"phase": phase, **labels},
    )


def scored(rollouts: Sequence[FinishedRollout]) -> tuple[list[ScoredRollout], Counter[str]]:
    """Return rollouts with their training rows, and why model calls were left out."""
    result: list[ScoredRollout] = []
    dropped: Counter[str] = Counter()
    for rollout in rollouts:
        made = transitions_of(rollout.rollout_id, rollout.attempt, rollout.group, rollout.spans)
        dropped += made.dropped
        result.append(ScoredRollout(rollout.rollout_id, rollout.group, rollout.reward, tuple(made.rows)))
    return result, dropped


def _version_of(finished: FinishedRollout) -> int:
    calls = (model_call(span) for span in finished.spans if is_model_call(span))
    versions = (version for call in calls for version, _, _ in call.weight_versions)
    return max((int(version) for version in versions if version.isdecimal()), default=-1)
