"""The trainer's view of the bus: submit rollouts, and get them back finished, in the log's order.

One background task follows the log and hands each finished rollout to whoever waits for its kind ("train",
"eval", "teacher": the label `phase`). What it hands out depends on the log alone, so a trainer that resumes from an
offset sees the same rollouts in the same order, and takes the same next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import msgspec

from lightning_bus import AgentError, BrokenError, Client, HookPool, Status, Submission, is_model_call, model_call
from lightning_bus.adapters import Cursor, FinishedRollout, Group, Groups

TRAIN, EVAL, TEACHER = "train", "eval", "teacher"


class RolloutStream:
    """Follows the log from `cursor`. `run` must be running in a task of its own."""

    def __init__(
        self, bus: Client, group_size: int, cursor: Cursor, limit_s: float, *, hooks: HookPool | None = None
    ) -> None:
        """limit_s  give up when no rollout has ended for so long
        hooks    says what rollouts earned, where a run has a reward hook
        """
        self.bus = bus
        self._limit_s = limit_s
        self._hooks = hooks
        self._groups = Groups(size=group_size, cursor=cursor, labels={"phase": TRAIN})
        self._ended: dict[str, FinishedRollout] = {}
        self._version_seen = -1
        self._progress = anyio.Event()

    async def run(self) -> None:
        """Follow the log for ever."""
        async for record in self.bus.follow(self._groups.next_offset):
            finished = self._groups.feed(record)
            if finished is not None:
                self._note(finished)

    async def next_groups(self, count: int) -> list[Group]:
        """Return the next `count` complete groups of training rollouts, in the order in which they became complete."""
        await self._wait_for(lambda: self._groups.complete >= count, f"{count} complete groups of rollouts")
        groups = [group for _ in range(count) if (group := self._groups.take()) is not None]
        return [replace(group, rollouts=tuple(await self._judged(group.rollouts))) for group in groups]

    async def wait_ended(self, rollout_ids: Collection[str]) -> list[FinishedRollout]:
        """Return these rollouts once all have ended, in the order given."""
        waiting = set(rollout_ids)

        def all_ended() -> bool:
            waiting.difference_update(self._ended)
            return not waiting

        await self._wait_for(
            all_ended, f"{len(waiting)} rollouts, {rollout_ids and next(iter(rollout_ids))} among them,"
        )
        return await self._judged([self._ended.pop(rollout_id) for rollout_id in rollout_ids])

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
        """What a checkpoint must keep, as plain values: the groups' Cursor."""
        return msgspec.to_builtins(self._groups.cursor)

    async def _judged(self, rollouts: Sequence[FinishedRollout]) -> list[FinishedRollout]:
        return list(rollouts) if self._hooks is None else await self._hooks.judge(rollouts)

    def _note(self, finished: FinishedRollout) -> None:
        self._version_seen = max(self._version_seen, _version_of(finished))
        if finished.labels.get("phase") != TRAIN:
            self._ended[finished.rollout_id] = finished
        self._progress.set()
        self._progress = anyio.Event()

    async def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait while rollouts keep ending; give up when none has ended for limit_s."""
        while not condition():
            with anyio.move_on_after(self._limit_s) as scope:
                await self._progress.wait()
            if scope.cancelled_caught:
                status = await self.bus.status()
                raise BrokenError(
                    f"waited {self._limit_s:g} s for {what} and no rollout ended: {status.workers} workers with {status.slots} "
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


def _version_of(finished: FinishedRollout) -> int:
    calls = (model_call(span) for span in finished.spans if is_model_call(span))
    versions = (version for call in calls for version, _, _ in call.weight_versions)
    return max((int(version) for version in versions if version.isdecimal()), default=-1)
